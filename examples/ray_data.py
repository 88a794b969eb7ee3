"""Rewrites a folder of JSON lines with Ray Data: each actor holds a server of its own.

    pip install 'ray[data]==2.60.0'
    python examples/ray_data.py --bprompt target/release/bprompt --input prompts.jsonl --output out

On a cluster give every actor its GPU or its cores (--gpus 1, --cpus 8), and leave a core for
reading and writing: actors that hold all of them wait for their input for ever. Rows keep their
other columns.
"""

import argparse
import json
import re
import subprocess
import urllib.request

import ray


class Rewriter:
    """One model, loaded once, on the node that runs the actor."""

    def __init__(self, bprompt, flags, options):
        self.options = options
        # what is written to the log ends with the actor
        self.server = subprocess.Popen(
            [bprompt, "serve", "--port", "0", "--log", "info", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.server.stderr:
            if found := re.search(r"http://[\d.:]+", line):
                self.url = found[0]
                break
        else:
            raise RuntimeError("bprompt serve did not start")
        self.drain = subprocess.Popen(["cat"], stdin=self.server.stderr, stdout=subprocess.DEVNULL)

    def __call__(self, batch):
        request = {"prompt": list(batch["prompt"]), **self.options}
        http = urllib.request.Request(
            f"{self.url}/v1/rewrite",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(http) as answer:
            results = json.load(answer)["results"]
        batch["rewritten"] = [r["candidates"][0]["text"] for r in results]
        batch["kept"] = [r["candidates"][0]["kept"] for r in results]
        return batch

    def __del__(self):
        self.server.terminate()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="bprompt")
    p.add_argument(
        "--flags", default="", help="flags for bprompt serve, such as '--model DIR --dtype int8'"
    )
    p.add_argument("--input", required=True)
    p.add_argument("--output", required=True)
    p.add_argument("--actors", type=int, default=1)
    p.add_argument("--cpus", type=float, default=1)
    p.add_argument("--gpus", type=float, default=0)
    p.add_argument("--min-kept", type=float, default=0.9)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    rows = ray.data.read_json(a.input, lines=True)
    rows.map_batches(
        Rewriter,
        fn_constructor_args=[a.bprompt, a.flags.split(), {"min_kept": a.min_kept, "seed": a.seed}],
        batch_size=256,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=a.actors),
        num_cpus=a.cpus,
        num_gpus=a.gpus,
    ).write_json(a.output)


main()
