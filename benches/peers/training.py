"""One training step on the CPU: bprompt compared with PyTorch, in turn, on the same shape.

Hidden 256, 8 layers, 4 heads, vocabulary 8192, 16 sequences of 128 tokens, AdamW, gradient
clipping.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/peers/training.py --output FILE
"""

import argparse
import time

import torch
from transformers import BloomConfig, BloomForCausalLM

from common import alternate, bprompt, finish


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    config = BloomConfig(
        vocab_size=8192,
        hidden_size=256,
        n_layer=8,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = BloomForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    ids = torch.randint(4, 8192, (16, 128))

    def step(autocast):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def best(autocast):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            step(autocast)
            times.append(time.perf_counter() - started)
        return 16 * 128 / min(times)

    def ours(precision):
        return bprompt(a.bprompt, "train", "--precision", precision, "--threads", str(a.threads))[
            "tokens_per_second"
        ]

    step(False)
    step(True)
    report = {
        "shape": "hidden 256, 8 layers, 4 heads, vocabulary 8192, 16 x 128 tokens",
        "threads": a.threads,
        "peer": f"torch {torch.__version__}",
    }
    pytorch = {}

    def theirs():
        pytorch["f32"], pytorch["bf16"] = best(False), best(True)
        return {
            "f32": pytorch["f32"],
            "bf16": pytorch["bf16"],
            "bf16_beside_their_f32": pytorch["f32"],
        }

    def own():
        f32, bf16 = ours("f32"), ours("bf16")
        return {"f32": f32, "bf16": bf16, "bf16_beside_their_f32": bf16}

    report["tokens_per_second"] = alternate(a.rounds, own, theirs)
    finish(report, a.output)


main()
