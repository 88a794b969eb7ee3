"""What the peer scripts share: running bprompt, alternating rounds, the report."""

import json
import os
import platform
import statistics
import subprocess
import time


def bprompt(binary, *arguments):
    """Runs a `bprompt bench` command and returns its JSON."""
    out = subprocess.run(
        [binary, "bench", *arguments, "--json"], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout)


def llm(binary, dtype, prompt, new, batch, repeats, threads):
    return bprompt(
        binary,
        "llm",
        "--shape",
        "bloom-1b1",
        "--dtype",
        dtype,
        "--prompt-tokens",
        str(prompt),
        "--new-tokens",
        str(new),
        "--batch",
        str(batch),
        "--repeats",
        str(repeats),
        "--threads",
        str(threads),
    )


def alternate(rounds, ours, theirs):
    """Runs both in turn; returns, figure by figure, the medians and the median of the rounds'
    ratios."""
    a, b = [], []
    for _ in range(rounds):
        b.append(theirs())
        a.append(ours())
    report = {}
    for key in a[0]:
        report[key] = {
            "ours": statistics.median(x[key] for x in a),
            "theirs": statistics.median(x[key] for x in b),
            "ratio": statistics.median(x[key] / y[key] for x, y in zip(a, b)),
        }
    return report


def machine():
    processor = platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            processor = next(
                line.split(": ")[1].strip() for line in f if line.startswith("model name")
            )
    except OSError:
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


def finish(report, path):
    text = json.dumps({"machine": machine(), **report}, indent=1)
    print(text)
    if path:
        with open(path, "w") as f:
            f.write(text + "\n")
