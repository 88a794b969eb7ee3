"""BLOOM-1b1 on the CPU: bprompt compared with Hugging Face transformers in bf16, in turn, on random
weights.

pip install torch==2.15.0 transformers==5.23.0
python benches/peers/transformers_cpu.py --output FILE
"""

import argparse
import time

import torch
from transformers import BloomConfig, BloomForCausalLM

from common import alternate, finish, llm


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    config = BloomConfig(
        vocab_size=250_880, hidden_size=1536, n_layer=24, n_head=16, torch_dtype=torch.bfloat16
    )
    torch.set_default_dtype(torch.bfloat16)
    model = BloomForCausalLM(config).eval()

    @torch.no_grad()
    def speed(batch, prompt, new):
        ids = torch.randint(4, 250_000, (batch, prompt))
        started = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        token = out.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return batch * prompt / prefill, batch * new / (time.perf_counter() - started)

    def theirs():
        prefill, decode = speed(1, 128, 8)
        return {"prefill_128": prefill, "decode_1": decode, "decode_16": speed(16, 16, 4)[1]}

    def ours():
        one = llm(a.bprompt, "bf16", 128, 16, 1, 2, a.threads)
        many = llm(a.bprompt, "bf16", 16, 8, 16, 1, a.threads)
        return {
            "prefill_128": one["prefill"]["tokens_per_second"],
            "decode_1": one["decode"]["tokens_per_second"],
            "decode_16": many["decode"]["tokens_per_second"],
        }

    speed(1, 16, 2)
    report = {
        "shape": "bloom-1b1",
        "threads": a.threads,
        "peer": f"transformers, torch {torch.__version__}",
    }
    report["bf16"] = alternate(a.rounds, ours, theirs)
    finish(report, a.output)


main()
