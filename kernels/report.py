"""What the compiler made of each kernel, without a GPU: registers, shared memory, spills,
occupancy, tensor-core instructions.

    pip install -r kernels/requirements.txt nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python kernels/report.py [--arch sm_90a] [--json]

Occupancy is the part of a multiprocessor's threads that registers and block size allow; dynamic
shared memory, which the launch decides, can allow less.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
# threads and registers of a multiprocessor
THREADS, REGISTERS = 2048, 65536
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTCHMMA)[.\w]*")


def tool(name):
    beside = pathlib.Path(os.environ["NVCC"]).parent / name if "NVCC" in os.environ else None
    found = beside if beside and beside.exists() else shutil.which(name)
    packages = [p for p in sys.path if p.endswith("site-packages")]
    installed = (p for s in packages for p in pathlib.Path(s).glob(f"nvidia/cu13/bin/{name}"))
    found = found or next(installed, None)
    if not found:
        sys.exit(
            f"{name} is not here: pip install -r kernels/requirements.txt "
            "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return str(found)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels(source, arch, folder):
    nvcc, cubin, ptx = tool("nvcc"), folder / f"{source.stem}.cubin", folder / f"{source.stem}.ptx"
    common = [nvcc, "-std=c++17", "-O3", f"-I{HERE / 'include'}", str(source)]
    run(*common, "-cubin", f"-arch={arch}", "-o", str(cubin))
    run(*common, "-ptx", f"-arch={arch}", "-o", str(ptx))
    threads = dict(re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx.read_text(), re.S))
    cuobjdump = tool("cuobjdump")
    os.environ["PATH"] = f"{pathlib.Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    instructions = collections.defaultdict(collections.Counter)
    name = None
    for line in run(cuobjdump, "-sass", str(cubin)).splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = match[1]
        elif name and (match := TENSOR_CORE.search(line)):
            instructions[name][match[1]] += 1
        elif name and re.search(r"\b(LDL|STL)\b", line):
            instructions[name]["local memory"] += 1
    usage = run(cuobjdump, "-res-usage", str(cubin))
    for name, rest in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        numbers = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", rest)}
        block = int(threads[name])
        # registers are handed out to warps in units of 256
        warp = -(-numbers["REG"] * 32 // 256) * 256
        blocks = min(THREADS // block, REGISTERS // (warp * (block // 32)), 32)
        yield {
            "kernel": name,
            "arch": arch,
            "threads": block,
            "registers": numbers["REG"],
            "static_shared_bytes": numbers["SHARED"],
            "stack_bytes": numbers["STACK"],
            "local_memory_accesses": instructions[name].pop("local memory", 0),
            "occupancy": blocks * block / THREADS,
            "tensor_core": dict(instructions[name]),
        }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arch", action="append", help="sm_80 and sm_90a if not given")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in a.arch or ["sm_80", "sm_90a"]:
            for source in sorted(HERE.glob("*.cu")):
                rows.extend(kernels(source, arch, pathlib.Path(folder)))
    if a.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'kernel':34} {'arch':7} threads regs stack spills occupancy tensor cores")
    for r in sorted(rows, key=lambda r: (r["kernel"], r["arch"])):
        cores = " ".join(f"{k} {v}" for k, v in r["tensor_core"].items())
        print(
            f"{r['kernel']:34} {r['arch']:7} {r['threads']:7} {r['registers']:4} "
            f"{r['stack_bytes']:5} {r['local_memory_accesses']:6} {r['occupancy']:9.0%} {cores}"
        )


main()
