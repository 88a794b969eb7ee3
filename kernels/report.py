"""What the compiler made of each kernel, without a GPU: registers, shared memory, spills,
occupancy, tensor-core instructions and size. `sass.py` says what to install.

    python3 kernels/report.py [--arch sm_90a]

Occupancy is the part of a multiprocessor's threads that registers and block size allow; dynamic
shared memory, which the launch decides, can allow less. `sass_gate.py --report` writes the same
rows, and the hot loops, as JSON.
"""

import argparse
import collections
import json
import re

import sass

# threads, registers and blocks of a multiprocessor
THREADS, REGISTERS, BLOCKS = 2048, 65536, 32
# kinds of instructions that are counted in a hot loop: tensor cores, copies, loads, exponentials
COUNTED = ["HMMA", "HGMMA", "UTMALDG", "UBLKCP", "LDGSTS", "LDG", "LD", "LDS", "LDSM", "MUFU"]
COUNTED += ["SHFL", "BAR", "MEMBAR"]
LETTERS = {"HMMA": "H", "HGMMA": "W", "LDGSTS": "C", "UTMALDG": "T", "UBLKCP": "T", "LDG": "g"}
LETTERS |= {"LD": "x", "LDS": "s", "LDSM": "m", "DEPBAR": "w", "SYNCS": "w", "BAR": "B"}
LETTERS |= {"MUFU": "e"}


def occupancy(threads, registers):
    """Registers are handed out to warps in units of 256."""
    warp = -(-registers * 32 // 256) * 256
    blocks = min(THREADS // threads, REGISTERS // (warp * -(-threads // 32)), BLOCKS)
    return blocks * threads / THREADS


def spills(kernel):
    return sum(i.kind in ("LDL", "STL") for i in kernel.code)


def tensor_core(instructions):
    return dict(collections.Counter(i.opcode for i in instructions if i.kind in sass.TENSOR_CORE))


def order(instructions, letters):
    """The chosen instructions in their order, such as `x2 s2 H4`; `2 (x2 s2 H4)` if the compiler
    unrolled the loop twice."""
    names = [LETTERS[i.kind] for i in instructions if LETTERS.get(i.kind, "") in letters.split()]
    runs = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    words = [name if count == 1 else f"{name}{count}" for name, count in runs]
    return " ".join(repeated(words))


def repeated(words):
    """The words with what repeats itself to the end in brackets: a a b a b is a 2 (a b)."""
    for start in range(len(words)):
        rest = words[start:]
        for period in range(1, len(rest) // 2 + 1):
            times, over = divmod(len(rest), period)
            if not over and rest == rest[:period] * times:
                return words[:start] + [f"{times} ({' '.join(rest[:period])})"]
    return words


def between(instructions, start, end):
    """What lies between an instruction that matches `start` and the next that matches `end`; the
    list is a loop's body, so its end is followed by its beginning. None if either is missing."""
    matches = lambda pattern, i: re.search(pattern, i.text)
    first = next((n for n, i in enumerate(instructions) if matches(start, i)), None)
    if first is None:
        return None
    turned = instructions[first + 1 :] + instructions[:first]
    last = next((n for n, i in enumerate(turned) if matches(end, i)), None)
    return None if last is None else turned[:last]


# the waits of a warpgroup for all of its wgmma but the youngest, and for all of them
WAIT_FOR_OLDER = r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x1$"
WAIT_FOR_ALL = r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x0$"


def hot_loop(kernel):
    counts = collections.Counter(i.kind for i in kernel.hot)
    row = {
        "instructions": len(kernel.hot),
        "path_instructions": len(kernel.hot_path),
        "tensor_core": tensor_core(kernel.hot),
        "counts": {kind: counts[kind] for kind in COUNTED if counts[kind]},
    }
    overlapped = between(kernel.hot, WAIT_FOR_OLDER, WAIT_FOR_ALL)
    if overlapped is not None:
        row["instructions_between_waits"] = len(overlapped)
        row["exponentials_between_waits"] = sum(i.opcode == "MUFU.EX2" for i in overlapped)
    return row


def row_of(kernel):
    row = {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "threads": kernel.threads,
        "registers": kernel.resources["REG"],
        "static_shared_bytes": kernel.resources["SHARED"],
        "stack_bytes": kernel.resources["STACK"],
        "local_memory_accesses": spills(kernel),
        "occupancy": occupancy(kernel.threads, kernel.resources["REG"]),
        "code_bytes": kernel.code_bytes,
        "tensor_core": tensor_core(kernel.code),
    }
    return row | {"hot_loop": hot_loop(kernel)} if kernel.hot_loop else row


def as_json(kernels):
    """A row a line, so that a change shows the kernels that it concerns."""
    return "[\n" + ",\n".join(f" {json.dumps(row_of(k))}" for k in kernels) + "\n]\n"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arch", action="append", help="sm_80 and sm_90a if not given")
    rows = [row_of(k) for k in sass.all_kernels(p.parse_args().arch or sass.ARCHS)]
    print(f"{'kernel':34} {'arch':7} threads regs stack spills occupancy   code tensor cores")
    for r in rows:
        cores = " ".join(f"{k} {v}" for k, v in r["tensor_core"].items())
        print(
            f"{r['kernel']:34} {r['arch']:7} {r['threads']:7} {r['registers']:4} "
            f"{r['stack_bytes']:5} {r['local_memory_accesses']:6} {r['occupancy']:9.0%} "
            f"{r['code_bytes']:6} {cores}"
        )


if __name__ == "__main__":
    main()
