"""Checks the kernels' machine code against `sass_expectations.toml`; needs no GPU. The compiler can
undo what a kernel is written for (delay a load, serialize an overlap, take a slow division) without
a word, and the results stay right. `sass.py` says what to install.

    python3 kernels/sass_gate.py [--report FILE | --check-report FILE]

Prints a line for each violation and ends with status 1. `--report` writes what the compiler made of
the kernels as JSON, `--check-report` compares it with such a file.
"""

import argparse
import collections
import dataclasses
import fnmatch
import pathlib
import re
import sys
import tomllib

import report
import sass

EXPECTATIONS = sass.HERE / "sass_expectations.toml"
# kinds of expectation that every kernel must have
REQUIRED = ["registers", "code_bytes"]
CHECKS = {}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check found: a number or a text, and what it is called in a message."""

    value: object
    what: str


def check(name, *keys):
    """Registers a function from kernel and entry to Found. The entry has `keys` besides those that
    all entries have."""

    def register(measure):
        CHECKS[name] = (measure, set(keys))
        return measure

    return register


@check("registers")
def registers(kernel, entry):
    return Found(kernel.resources["REG"], "registers")


@check("code_bytes")
def code_bytes(kernel, entry):
    return Found(kernel.code_bytes, "bytes of code")


@check("count", "what", "scope")
def count(kernel, entry):
    """How many instructions of a scope match a pattern. A scope that a kernel does not have says
    nothing about it."""
    scope = SCOPES[entry["scope"]](kernel)
    if not scope:
        return Found(None, entry["scope"])
    matching = [i for i in scope if re.search(entry["what"], i.text)]
    return Found(len(matching), f"{entry['what']} in the {entry['scope']}")


@check("between", "what", "start", "end")
def between(kernel, entry):
    """The same between two instructions of the hot loop."""
    part = report.between(kernel.hot, entry["start"], entry["end"])
    if part is None:
        return Found(None, f"{entry['start']} and {entry['end']} in the hot loop")
    matching = [i for i in part if re.search(entry["what"], i.text)]
    return Found(len(matching), f"{entry['what']} between {entry['start']} and {entry['end']}")


@check("order", "letters")
def order(kernel, entry):
    return Found(report.order(kernel.hot, entry["letters"]), "order in the hot loop")


@check("shapes")
def shapes(kernel, entry):
    """The shapes of the tensor-core instructions, such as 64x96x16 or 16816."""
    found = {opcode.split(".")[1] for opcode in report.tensor_core(kernel.code)}
    return Found(" ".join(sorted(found)), "tensor-core shapes")


@check("instructions_per_2kb", "what", "bytes")
def instructions_per_2kb(kernel, entry):
    """Instructions of the hot path for 2 KB of weights, of which each instruction that matches
    `what` takes `bytes`."""
    units = sum(bool(re.search(entry["what"], i.text)) for i in kernel.hot_path)
    if not units:
        return Found(None, f"{entry['what']} in the hot path")
    each = len(kernel.hot_path) * 2048 / (units * entry["bytes"])
    return Found(round(each, 1), "instructions of the hot path per 2 KB of weights")


def in_tensor_loops(kernel):
    """What lies in any loop with wgmma, however far out."""
    numbers = {i for loop in kernel.loops_with({"HGMMA"}) for i in loop.body}
    return [kernel.code[i] for i in sorted(numbers)]


SCOPES = {
    "kernel": lambda kernel: kernel.code,
    "hot loop": lambda kernel: kernel.hot,
    "hot path": lambda kernel: kernel.hot_path,
    "loops with HGMMA": in_tensor_loops,
}
BOUNDS = {
    "max": ("at most", lambda found, bound: found <= bound),
    "min": ("at least", lambda found, bound: found >= bound),
    "is": ("exactly", lambda found, bound: found == bound),
}


def check_entries(entries):
    """Ends the program if an entry is not as CHECKS describes it."""
    for entry in entries:
        where = f"{EXPECTATIONS.name}: {entry.get('check', 'an entry')}: {entry.get('kernels')}"
        known = entry.get("check") in CHECKS
        if not known:
            sys.exit(f"{where}: check must be one of {', '.join(CHECKS)}")
        keys = CHECKS[entry["check"]][1] | {"check", "kernels", "reason"}
        bounds = entry.keys() & BOUNDS.keys()
        if len(bounds) != 1 or keys - entry.keys():
            sys.exit(f"{where}: needs {', '.join(sorted(keys))} and one of {', '.join(BOUNDS)}")
        if unknown := entry.keys() - keys - bounds - {"archs", "goal"}:
            sys.exit(f"{where}: {', '.join(sorted(unknown))} means nothing here")
        if entry.get("scope", "kernel") not in SCOPES:
            sys.exit(f"{where}: scope must be one of {', '.join(SCOPES)}")


def load(path=EXPECTATIONS):
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["expect"]
    check_entries(entries)
    return entries


def applies(entry, kernel):
    archs = entry.get("archs", sass.ARCHS)
    named = any(fnmatch.fnmatchcase(kernel.name, pattern) for pattern in entry["kernels"])
    return named and kernel.arch in archs


def bound_of(entry):
    return next((key, entry[key]) for key in BOUNDS if key in entry)


def violations(kernels, entries):
    """A line for each."""
    for entry in entries:
        measure, _ = CHECKS[entry["check"]]
        bound, expected = bound_of(entry)
        words, holds = BOUNDS[bound]
        concerned = [kernel for kernel in kernels if applies(entry, kernel)]
        if not concerned:
            yield f"{entry['check']} of {', '.join(entry['kernels'])}: there is no such kernel"
        for kernel in concerned:
            found = measure(kernel, entry)
            if found.value is None:
                yield f"{kernel.name} {kernel.arch}: no {found.what}: {entry['reason']}"
            elif not holds(found.value, expected):
                yield (
                    f"{kernel.name} {kernel.arch}: {found.what}: found {found.value}, "
                    f"expected {words} {expected}: {entry['reason']}"
                )
    for kernel in kernels:
        checks = {entry["check"] for entry in entries if applies(entry, kernel)}
        for missing in [name for name in REQUIRED if name not in checks]:
            yield f"{kernel.name} {kernel.arch}: no expectation of {missing} names this kernel"


def open_goals(kernels, entries):
    """A line for each goal that some kernel has not reached."""
    for entry in entries:
        if "goal" not in entry:
            continue
        holds = BOUNDS[bound_of(entry)[0]][1]
        found = [CHECKS[entry["check"]][0](k, entry) for k in kernels if applies(entry, k)]
        missed = [f for f in found if f.value is None or not holds(f.value, entry["goal"])]
        if missed:
            values = spread([f.value for f in missed])
            yield (
                f"{', '.join(entry['kernels'])} ({len(missed)} kernels): {missed[0].what}: "
                f"{values}, the goal is {entry['goal']}"
            )


def spread(values):
    """The smallest and the largest of numbers, all different ones of texts."""
    if all(isinstance(v, (int, float)) for v in values) and min(values) < max(values):
        return f"{min(values)} to {max(values)}"
    return " or ".join(dict.fromkeys(map(str, values)))


def differing_rows(kernels, path):
    """A line for each row in which a report that was kept differs from what was compiled."""
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    made = report.as_json(kernels)
    rows = collections.Counter(line.rstrip(",") for line in made.split("\n"))
    rows.subtract(line.rstrip(",") for line in kept.split("\n"))
    for row, times in rows.items():
        if times and '"kernel"' in row:
            name = " ".join(re.findall(r'"(?:kernel|arch)": "(\w+)"', row))
            yield f"{path}: {name}: {'is missing or old' if times > 0 else 'is no longer so'}"
    if made != kept:
        yield f"{path} differs: python3 kernels/sass_gate.py --report {path}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--report", type=pathlib.Path, metavar="FILE")
    p.add_argument("--check-report", type=pathlib.Path, metavar="FILE")
    args = p.parse_args()
    entries, kernels = load(), sass.all_kernels()
    if args.report:
        args.report.write_text(report.as_json(kernels), encoding="utf-8")
    failures = list(violations(kernels, entries))
    if args.check_report:
        failures += differing_rows(kernels, args.check_report)
    for line in open_goals(kernels, entries):
        print(f"goal: {line}")
    for line in failures:
        print(line)
    print(f"{len(kernels)} kernels, {len(entries)} expectations, {len(failures)} violations")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
