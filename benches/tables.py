"""Writes the tables of README.md and docs/ from the measurements in benches/results.

    python3 benches/tables.py            # rewrites what stands between the markers
    python3 benches/tables.py --check    # status 1, and the file and the table, if one differs

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function of
`TABLES` below. No figure is typed by hand: a new measurement replaces its JSON file.
"""

import argparse
import re
import sys

import time_model
import time_model_training
from cells import ROOT, markdown, number, percent, result

BEGIN, END = re.compile(r"<!-- table: ([\w-]+) -->"), "<!-- end -->"
TABLES = {}


def table(name):
    """Registers a function that returns rows of cells, the heading first."""

    def register(make):
        TABLES[name] = make
        return make

    return register


def compared(figures):
    """Ours, theirs, and the median of the rounds' ratios."""
    return [number(figures["ours"]), number(figures["theirs"]), f"{figures['ratio']:.2f}"]


LLM = {
    "prefill_128": "prefill of 128 tokens",
    "decode_1": "decode, one sequence",
    "decode_16": "decode, 16 sequences",
}


def llama_rows(name):
    """What was done, with which weights of llama.cpp it is compared, and the three figures."""
    llama = result(name)
    for dtype, name in [("bf16", "llama.cpp, bf16"), ("int8", "llama.cpp, Q8_0")]:
        for key, what in LLM.items():
            yield f"BLOOM-1b1 {dtype}, {what}", name, llama[dtype][key]


def cpu_rows():
    """The same for all peers."""
    yield from llama_rows("llama_cpp_zen5_2cores")
    transformers = result("transformers_zen5_2cores")
    for key, what in LLM.items():
        yield f"BLOOM-1b1 bf16, {what}", "transformers, bf16", transformers["bf16"][key]


def training_rows():
    tokens = result("training_zen5_2cores")["tokens_per_second"]
    yield "training step, f32", "PyTorch, f32", tokens["f32"]
    yield "training step, bf16", "PyTorch, bf16 autocast", tokens["bf16"]
    yield "training step, bf16", "PyTorch, f32", tokens["bf16_beside_their_f32"]


HEADING = ["tokens a second", "compared with", "ours", "theirs", "ratio"]


@table("cpu")
def cpu():
    return [HEADING] + [[what, peer, *compared(figures)] for what, peer, figures in cpu_rows()]


@table("cpu-zen4")
def cpu_zen4():
    rows = llama_rows("llama_cpp_zen4_2cores")
    return [HEADING] + [[what, peer, *compared(figures)] for what, peer, figures in rows]


@table("training")
def training():
    return [HEADING] + [[what, peer, *compared(figures)] for what, peer, figures in training_rows()]


@table("cpu-floors")
def cpu_floors():
    llama = result("llama_cpp_zen5_2cores")
    rows = [["BLOOM-1b1", "prefill", "decode, one sequence", "peak memory"]]
    for dtype in ["bf16", "int8"]:
        reached = llama[dtype]["fraction_of_floor"]
        memory = llama[dtype]["peak_memory_bytes"] / 1e6
        rows.append(
            [dtype, percent(reached["prefill"]), percent(reached["decode"]), f"{number(memory)} MB"]
        )
    return rows


@table("serving")
def serving():
    measured, prefix = result("serving_zen5_2cores"), result("prefix_cache_zen5_2cores")
    server, bare = measured["beside_llama_server"], measured["beside_bare_engine"]
    template = (
        f"median TTFT (ms), template of {prefix['template_tokens']} tokens, "
        f"{prefix['full_blocks_from_the_cache']} full blocks of it from the prefix cache"
    )
    rows = [
        ("output tokens a second", "llama-server", server["output_throughput"]),
        ("median TTFT (ms)", "llama-server", server["ttft_ms"]),
        ("median ITL (ms)", "llama-server", server["itl_ms"]),
        ("output tokens a second", "the engine without HTTP", bare["output_throughput"]),
        (template, "`--no-prefix-cache`", prefix["median_ttft_ms"]),
    ]
    return [["", "compared with", "ours", "theirs", "ratio"]] + [
        [what, peer, *compared(figures)] for what, peer, figures in rows
    ]


def gpu_llm(rows, weights="bf16"):
    return {row["batch"]: row for row in rows if row["weights"] == weights}


def gpu_rows(measured):
    """Prefill and decode of a GPU, where it was measured compared with transformers."""
    peer = measured["peers"]["transformers_eager"]
    rows = [
        ["sequences", "prefill", "transformers", "ratio"]
        + ["decode", "transformers", "ratio", "of the floor in decode"]
    ]
    for batch, own in gpu_llm(measured["llm"]).items():
        cells = [str(batch)]
        for phase in ["prefill", "decode"]:
            figures = peer.get(f"{phase}_{batch}")
            if figures:
                cells += compared(figures)
            else:
                cells += [number(own[phase]["tokens_per_second"]), "", ""]
        rows.append(cells + [percent(own["decode"]["fraction"])])
    return rows


def gpu_operations(measured):
    """Single operations of a GPU compared with PyTorch's, by the shape of the batch."""
    shapes, operations = [], {}
    for row in measured["peers"]["operations"]:
        if row["operation"] == "square GEMM":
            continue
        sequences, tokens = row["sequences"], row["tokens"]
        shape = f"{sequences} x {tokens}"
        if shape not in shapes:
            shapes.append(shape)
        cell = f"{number(row['ours_us'])} / {number(row['theirs_us'])}"
        operations.setdefault(row["operation"], {})[shape] = cell
    return [["ours / theirs, microseconds", *shapes]] + [
        [name, *(cells[shape] for shape in shapes)] for name, cells in operations.items()
    ]


H100_STATES = {
    "first_run": "first run",
    "weights_through_rings": "weights through rings",
    "parameters_prefetched": "parameters prefetched",
    "softmax_beside_products": "softmax beside products",
    "epilogues_overlapped": "now",
}


@table("gpu-h100")
def gpu_h100():
    return gpu_rows(result("gpu_h100")["epilogues_overlapped"])


@table("gpu-h100-operations")
def gpu_h100_operations():
    return gpu_operations(result("gpu_h100")["epilogues_overlapped"])


@table("gpu-h100-states")
def gpu_h100_states():
    measured, batches = result("gpu_h100"), [1, 8, 64, 256]
    rows = [["kernels", *(f"decode, {b}" for b in batches), "prefill, 64"]]
    for state, what in H100_STATES.items():
        own = gpu_llm(measured[state]["llm"])
        rates = [own[b]["decode"]["tokens_per_second"] for b in batches]
        rates.append(own[64]["prefill"]["tokens_per_second"])
        rows.append([what, *map(number, rates)])
    return rows


@table("gpu-h200")
def gpu_h200():
    return gpu_rows(result("gpu_h200"))


@table("beats")
def beats():
    """The README's: what this program is compared with, and by how much it is faster."""
    gpu = result("gpu_h100")["epilogues_overlapped"]["peers"]["transformers_eager"]
    rows = [["BLOOM-1b1, tokens a second", "machine", "compared with", "ours", "theirs", "ratio"]]
    for key, what in [
        ("decode_1", "decode, one sequence"),
        ("decode_64", "decode, 64 sequences"),
        ("prefill_64", "prefill, 64 prompts of 128 tokens"),
    ]:
        rows.append([f"bf16 {what}", "H100", "transformers, bf16", *compared(gpu[key])])
    llama, cores = result("llama_cpp_zen5_2cores"), "2 CPU cores"
    for dtype, peer in [("bf16", "llama.cpp, bf16"), ("int8", "llama.cpp, Q8_0")]:
        for key in ["decode_1", "decode_16", "prefill_128"]:
            rows.append([f"{dtype} {LLM[key]}", cores, peer, *compared(llama[dtype][key])])
    served = result("serving_zen5_2cores")["beside_llama_server"]["output_throughput"]
    rows.append(["bf16 server, 16 streams", cores, "llama-server, bf16", *compared(served)])
    what, peer, figures = list(training_rows())[1]
    rows.append([f"{what} (a smaller model)", cores, peer, *compared(figures)])
    return rows


@table("time-model")
def time_model_cases():
    return time_model.case_rows()


@table("time-model-layer")
def time_model_layer():
    return time_model.layer_rows()


@table("time-model-constants")
def time_model_constants():
    return time_model.constant_rows()


@table("time-model-training")
def time_model_training_step():
    return time_model_training.step_rows()


@table("time-model-training-gemms")
def time_model_training_gemms():
    return time_model_training.cause_rows()


@table("time-model-training-goals")
def time_model_training_goals():
    return time_model_training.goal_rows()


@table("meaning")
def meaning():
    rows = [
        ["words of the prompt", "meaning kept, `--min-kept 0`", "tokens"]
        + ["meaning kept, default", "tokens", "fell back on the prompt"]
    ]
    for row in result("meaning_and_style")["meaning"]["rows"]:
        plain, default = row["plain"], row["default"]
        rows.append(
            [row["words"], percent(plain["kept"], 1), f"{plain['tokens']:.1f}"]
            + [percent(default["kept"], 1), f"{default['tokens']:.1f}"]
            + [percent(default["fallbacks"], 1)]
        )
    return rows


@table("style")
def style():
    columns = result("meaning_and_style")["style"]["columns"]
    flags = [c["flags"] for c in columns]
    rows = [["", *(f if f == "default" else f"`{f}`" for f in flags)]]
    for key, what, form in [
        ("kept", "meaning kept", lambda v: percent(v, 1)),
        ("distinct_tails", "distinct tails", str),
        (
            "common_phrases",
            "added phrases that are among the 60 commonest",
            lambda v: percent(v, 1),
        ),
        ("artists", "outputs that add artists", lambda v: percent(v, 1)),
        (
            "contradicting_media",
            "outputs that name media which exclude each other",
            lambda v: percent(v, 1),
        ),
        ("median_seconds", "seconds a rewrite, median", lambda v: f"{v:.3f}"),
    ]:
        rows.append([what, *(form(c[key]) for c in columns)])
    return rows


def filled(path, used):
    """The file's text with its tables made anew, and the names of those that differ."""
    out, differing, lines = [], [], path.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        out.append(lines[at])
        begin = BEGIN.fullmatch(lines[at])
        at += 1
        if not begin:
            continue
        name = begin[1]
        if name not in TABLES:
            sys.exit(f"{path.relative_to(ROOT)}: there is no table named {name}")
        if END not in lines[at:]:
            sys.exit(f"{path.relative_to(ROOT)}: table {name} has no {END}")
        end = lines.index(END, at)
        made = markdown(TABLES[name]())
        if lines[at:end] != made:
            differing.append(name)
        out += [*made, END]
        at = end + 1
        used.add(name)
    return "\n".join(out), differing


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="change nothing; fail if a table differs")
    check = p.parse_args().check
    used, failed = set(), False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text, differing = filled(path, used)
        for name in differing:
            verb = "differs from benches/results" if check else "was made anew"
            print(f"{path.relative_to(ROOT)}: table {name} {verb}")
        if differing and not check:
            path.write_text(text, encoding="utf-8")
        failed |= check and bool(differing)
    for name in sorted(TABLES.keys() - used):
        print(f"benches/tables.py: table {name} stands in no page")
        failed |= check
    return failed


sys.exit(main())
