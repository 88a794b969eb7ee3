"""The kernels as machine code (SASS): compiles them with nvcc, disassembles them with cuobjdump and
finds their loops. `report.py` and `sass_gate.py` stand on it; no GPU is needed.

    python3 -m pip install --target target/cuda -r kernels/requirements.txt
    export NVCC=$PWD/target/cuda/nvidia/cu13/bin/nvcc
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ARCHS = ["sm_80", "sm_90a"]
TENSOR_CORE = {"HMMA", "HGMMA"}
COPIES = {"LDGSTS", "UTMALDG", "UBLKCP"}  # cp.async, TMA of tiles, bulk copies
INSTRUCTION_BYTES = 16
FUNCTION = re.compile(r"\s*Function : (\w+)")
INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # as written, such as @!P0; empty if there is none
    opcode: str  # with its modifiers, such as MUFU.EX2
    operands: str

    @property
    def kind(self):
        return self.opcode.split(".")[0]

    @property
    def text(self):
        return f"{self.opcode} {self.operands}"

    @property
    def never(self):
        """Whether it never runs: ptxas pads copies to shared memory with such loads."""
        return self.predicate == "@!PT"


@dataclasses.dataclass(frozen=True)
class Loop:
    header: int  # number of the instruction that all iterations begin with
    body: list  # numbers of instructions, in the order of their addresses from the header on


@dataclasses.dataclass
class Kernel:
    name: str
    arch: str
    code: list
    threads: int = 0
    resources: dict = dataclasses.field(default_factory=dict)

    @property
    def code_bytes(self):
        return len(self.code) * INSTRUCTION_BYTES

    @functools.cached_property
    def loops(self):
        return loops_of(self.code)

    def loops_with(self, kinds):
        return [loop for loop in self.loops if any(self.code[i].kind in kinds for i in loop.body)]

    @functools.cached_property
    def hot_loop(self):
        """The innermost loop with the most tensor-core instructions, or None without any."""
        loops = self.loops_with(TENSOR_CORE)
        bodies = [set(loop.body) for loop in loops]
        innermost = [l for l, own in zip(loops, bodies) if not any(b < own for b in bodies)]
        count = lambda loop: sum(self.code[i].kind in TENSOR_CORE for i in loop.body)
        return max(innermost, key=count, default=None)

    @functools.cached_property
    def hot(self):
        """The instructions of the hot loop that can run; none without such a loop."""
        body = self.hot_loop.body if self.hot_loop else []
        return [self.code[i] for i in body if not self.code[i].never]


    @functools.cached_property
    def hot_path(self):
        """The instructions that an iteration of the hot loop issues if it does all of its work:
        those on the way round with the most tensor-core instructions and copies, and with as few
        others as these allow. What happens once in many iterations lies beside it."""
        if not self.hot_loop:
            return []
        return [self.code[i] for i in busiest_path(self.code, self.hot_loop)]


def parse(text):
    """The instructions of each function in what `cuobjdump -sass` prints."""
    functions, code = {}, None
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            code = functions.setdefault(match[1], [])
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return functions


def target_of(instruction):
    """The address that a branch goes to, or None. ptxas also leaves loops by CALL. BRA.DIV is for
    diverged warps and leads to code that gathers their lanes: no path of a loop."""
    if instruction.kind not in ("BRA", "CALL") or instruction.opcode.startswith("BRA.DIV"):
        return None
    return int(re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1], 16)


def falls_through(instruction):
    """Whether the next instruction can be run behind this one. BRA.CONV skips, for warps that have
    not diverged, code that gathers their lanes."""
    if instruction.kind in ("EXIT", "RET", "BRX", "JMP"):
        return bool(instruction.predicate)
    if instruction.kind != "BRA" or instruction.opcode.startswith("BRA.DIV"):
        return True
    if instruction.opcode.startswith("BRA.CONV"):
        return False
    conditional = instruction.predicate or re.search(r"\bU?P\d", instruction.operands)
    return bool(conditional or instruction.opcode != "BRA")


def basic_blocks(code):
    """Ranges of instructions that run one after the other, and the successors of each."""
    number = {instruction.address: i for i, instruction in enumerate(code)}
    targets = [number.get(target_of(instruction)) for instruction in code]
    leaders = {0} | {t for t in targets if t is not None}
    leaders |= {i + 1 for i, t in enumerate(targets) if t is not None or not falls_through(code[i])}
    starts = sorted(i for i in leaders if i < len(code))
    block_at = {start: b for b, start in enumerate(starts)}
    ranges = [range(a, b) for a, b in zip(starts, starts[1:] + [len(code)])]
    successors = []
    for block in ranges:
        last = block[-1]
        next_ones = [targets[last]] if targets[last] is not None else []
        if falls_through(code[last]) and last + 1 < len(code):
            next_ones.append(last + 1)
        successors.append([block_at[i] for i in next_ones])
    return ranges, successors


def reverse_postorder(successors):
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        fresh = next((s for s in rest if s not in seen), None)
        if fresh is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(successors[fresh])))
    return order[::-1]


def immediate_dominators(order, predecessors):
    """After Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm"."""
    rank = {block: i for i, block in enumerate(order)}
    dominator = {order[0]: order[0]}

    def common(a, b):
        while a != b:
            if rank[a] > rank[b]:
                a = dominator[a]
            else:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            new = functools.reduce(common, known)
            changed |= dominator.get(block) != new
            dominator[block] = new
    return dominator


def dominates(dominator, a, b):
    while b != a and dominator[b] != b:
        b = dominator[b]
    return b == a


def loops_of(code):
    """The natural loops: those of backward branches to a block that all ways into the loop pass.
    Code that the compiler moved out of line belongs to the loop that it returns to, wherever it
    stands."""
    if not code:
        return []
    ranges, successors = basic_blocks(code)
    order = reverse_postorder(successors)
    predecessors = collections.defaultdict(list)
    for block in order:
        for s in successors[block]:
            predecessors[s].append(block)
    dominator = immediate_dominators(order, predecessors)
    bodies = {}
    for block in order:
        for header in successors[block]:
            if dominates(dominator, header, block):
                gather(bodies.setdefault(header, {header}), block, predecessors)
    return [
        Loop(ranges[header][0], from_header(ranges, header, blocks))
        for header, blocks in bodies.items()
    ]


def busiest_path(code, loop):
    """The numbers of the instructions of a way from a loop's header back to it."""
    ranges, successors = basic_blocks(code)
    body = set(loop.body)
    inside = {b for b, block in enumerate(ranges) if block[0] in body}
    header = next(b for b in inside if ranges[b][0] == loop.header)
    order = [b for b in reverse_postorder(successors) if b in inside]
    rank = {block: i for i, block in enumerate(order)}

    def value(block):
        kinds = [code[i].kind for i in ranges[block] if not code[i].never]
        work = sum(kind in TENSOR_CORE or kind in COPIES for kind in kinds)
        return work, -len(kinds)

    # the best way from the header to each block, by blocks that only go forward
    best = {header: (value(header), [header])}
    for block in order:
        if block not in best:
            continue
        (work, cost), way = best[block]
        for s in successors[block]:
            if s in inside and s != header and rank[s] > rank[block]:
                more = value(s)
                found = ((work + more[0], cost + more[1]), way + [s])
                if s not in best or found[0] > best[s][0]:
                    best[s] = found
    ends = [best[b] for b in order if header in successors[b] and b in best]
    _, way = max(ends, key=lambda end: end[0])
    return [i for b in way for i in ranges[b] if not code[i].never]


def gather(body, block, predecessors):
    """Adds to a loop's body the blocks that reach `block` without passing its header."""
    work = [block]
    while work:
        block = work.pop()
        if block not in body:
            body.add(block)
            work += predecessors[block]


def from_header(ranges, header, blocks):
    turned = sorted(blocks, key=lambda b: (b < header, b))
    return [i for b in turned for i in ranges[b]]


def tool(name):
    """The path of nvcc, cuobjdump or nvdisasm: beside $NVCC, in PATH, or in a package."""
    beside = pathlib.Path(os.environ["NVCC"]).parent / name if "NVCC" in os.environ else None
    found = beside if beside and beside.exists() else shutil.which(name)
    packages = [p for p in sys.path if p.endswith("site-packages")]
    installed = (p for s in packages for p in pathlib.Path(s).glob(f"nvidia/cu13/bin/{name}"))
    found = found or next(installed, None)
    if not found:
        sys.exit(f"{name} is not here: pip install -r kernels/requirements.txt")
    return str(found)


def run(*command):
    """What the command prints. cuobjdump looks for nvdisasm in PATH."""
    path = f"{pathlib.Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def compiled(source, arch, folder):
    """The kernels of one file."""
    folder = pathlib.Path(folder, arch, source.stem)
    folder.mkdir(parents=True)
    cubin = folder / "code.cubin"
    flags = ["-std=c++17", "-O3", f"-I{HERE / 'include'}", f"-arch={arch}"]
    # the PTX, which says how many threads a block has, is kept on the way
    keep = ["-keep", f"-keep-dir={folder}"]
    run(tool("nvcc"), *flags, *keep, "-cubin", str(source), "-o", str(cubin))
    ptx = (folder / f"{source.stem}.ptx").read_text(encoding="utf-8")
    threads = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.S))
    usage = run(tool("cuobjdump"), "-res-usage", str(cubin))
    functions = parse(run(tool("cuobjdump"), "-sass", str(cubin)))
    kernels = []
    for name, rest in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        resources = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", rest)}
        kernels.append(Kernel(name, arch, functions[name], int(threads[name]), resources))
    return kernels


def all_kernels(archs=ARCHS):
    """All kernels for all architectures, sorted. Every processor compiles a file at a time."""
    jobs = [(source, arch) for source in sorted(HERE.glob("*.cu")) for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            made = pool.map(lambda job: compiled(*job, folder), jobs)
            kernels = [kernel for of_file in made for kernel in of_file]
    return sorted(kernels, key=lambda k: (k.name, k.arch))
