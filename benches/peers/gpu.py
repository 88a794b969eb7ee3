"""BLOOM on a GPU: bprompt compared with Hugging Face transformers, cuBLAS and PyTorch's attention,
on random weights of one shape.

    pip install torch transformers
    python benches/peers/gpu.py --output FILE

transformers runs eagerly and, with --compile, compiled with a static cache. cuBLAS (torch's linear)
and scaled dot-product attention with ALiBi as its mask run on the shapes of `bprompt bench
kernels`; the layers' weights take turns as they do there.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM, StaticCache

from common import alternate, bprompt, finish

SHAPES = {
    "bloom-560m": (1024, 24, 16),
    "bloom-1b1": (1536, 24, 16),
    "bloom-1b7": (2048, 24, 16),
    "bloom-3b": (2560, 30, 32),
}
VOCAB = 250_880


def seconds(device, calls, work):
    """Seconds of one of `calls` calls, by the device's clock; the best of three."""
    for i in range(calls):
        work(i)
    times = []
    for _ in range(3):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for i in range(calls):
                work(i)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            for i in range(calls):
                work(i)
            times.append(time.perf_counter() - started)
    return min(times) / calls


def model_speed(a, model, compiled):
    """Tokens a second of prefill and decode, by batch."""
    forward = (
        torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        if compiled
        else model.forward
    )
    figures = {}
    for batch in a.batch:
        length = a.context + a.new_tokens + 8
        cache = StaticCache(config=model.config, max_cache_len=length) if compiled else None
        ids = torch.randint(4, 250_000, (batch, a.context), device=a.device)
        mask = torch.ones(
            batch, length if compiled else a.context, dtype=torch.long, device=a.device
        )
        if compiled:
            mask[:, a.context :] = 0
        with torch.no_grad():
            for _ in range(2):  # the first time warms up
                if compiled:
                    cache.reset()
                started = now(a.device)
                out = model.forward(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                token = out.logits[:, -1:].argmax(-1)
                prefill = now(a.device) - started
                past, steps = out.past_key_values, []
                grown = mask.clone()
                for step in range(a.new_tokens):
                    position = torch.tensor([a.context + step], device=a.device)
                    if compiled:
                        grown[:, a.context + step] = 1
                    else:
                        grown = F.pad(grown, (0, 1), value=1)
                    started = now(a.device)
                    out = forward(
                        token,
                        attention_mask=grown,
                        past_key_values=past,
                        use_cache=True,
                        cache_position=position,
                    )
                    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
                    steps.append(now(a.device) - started)
        figures[f"prefill_{batch}"] = batch * a.context / prefill
        figures[f"decode_{batch}"] = batch / statistics.median(steps)
    return figures


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def own_speed(a):
    figures = {}
    for batch in a.batch:
        r = bprompt(
            a.bprompt,
            "llm",
            "--device",
            a.device,
            "--shape",
            a.shape,
            "--dtype",
            "bf16",
            "--prompt-tokens",
            str(a.context),
            "--new-tokens",
            str(a.new_tokens),
            "--batch",
            str(batch),
        )
        figures[f"prefill_{batch}"], figures[f"decode_{batch}"] = (
            r["prefill"]["tokens_per_second"],
            r["decode"]["tokens_per_second"],
        )
    return figures


def kernels(a, hidden, layers, heads):
    """Microseconds of single operations: ours, and PyTorch's for the same product or attention."""
    size = hidden // heads
    own = bprompt(
        a.bprompt,
        "kernels",
        "--device",
        a.device,
        "--shape",
        a.shape,
        "--dtype",
        "bf16",
        "--batch",
        ",".join(map(str, a.batch)),
        "--context",
        str(a.context),
        "--prefill",
        a.prefill,
        "--squares",
        str(a.square),
    )
    new = dict(dtype=torch.bfloat16, device=a.device)
    products = {
        "norm + QKV into cache": (3 * hidden, hidden),
        "dense + residual": (hidden, hidden),
        "norm + up + GELU": (4 * hidden, hidden),
        "down + residual": (hidden, 4 * hidden),
    }
    weights = {
        name: [torch.randn(*shape, **new) * 0.02 for _ in range(layers)]
        for name, shape in products.items()
    }
    slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)], **new)
    rows = []
    for r in own["rows"]:
        tokens = r["sequences"] * r["tokens"]
        if r["operation"] in products:
            x = torch.randn(tokens, products[r["operation"]][1], **new)
            work = lambda i: F.linear(x, weights[r["operation"]][i % layers])
            peer = "linear, without norm, epilogue or cache"
        elif r["operation"] == "square GEMM":
            x, w = (torch.randn(tokens, tokens, **new) for _ in range(2))
            work = lambda i: F.linear(x, w)
            peer = "linear, results in 16 bits"
        elif r["operation"] == "attention":
            q = torch.randn(r["sequences"], heads, r["tokens"], size, **new)
            k, v = (
                torch.randn(r["sequences"], heads, r["positions"], size, **new) for _ in range(2)
            )
            distance = (
                torch.arange(r["positions"], device=a.device)[None]
                - torch.arange(r["positions"] - r["tokens"], r["positions"], device=a.device)[
                    :, None
                ]
            )
            bias = (
                (slopes[:, None, None] * distance)
                .masked_fill(distance > 0, float("-inf"))[None]
                .to(torch.bfloat16)
            )
            work = lambda i: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            peer = "scaled_dot_product_attention with ALiBi as its mask"
        else:
            continue
        theirs = 1e6 * seconds(a.device, a.calls, work)
        rows.append(
            {
                "operation": r["operation"],
                "sequences": r["sequences"],
                "tokens": r["tokens"],
                "positions": r["positions"],
                "peer": peer,
                "ours_us": r["microseconds"],
                "theirs_us": theirs,
                "speedup": theirs / r["microseconds"],
                "fraction_of_floor": r["fraction"],
            }
        )
    return rows


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--shape", default="bloom-1b1", choices=SHAPES)
    p.add_argument(
        "--layers", type=int, help="fewer layers of the peer, for a trial; ours are not changed"
    )
    p.add_argument("--batch", type=lambda t: [int(b) for b in t.split(",")], default=[1, 64, 256])
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--prefill", default="64x128,1x2048")
    p.add_argument(
        "--square",
        type=int,
        default=8192,
        help="rows of the square matrices that are multiplied too",
    )
    p.add_argument("--calls", type=int, default=24)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--output")
    a = p.parse_args()
    hidden, layers, heads = SHAPES[a.shape]
    layers = a.layers or layers
    name = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    report = {
        "shape": a.shape,
        "device": name,
        "peer": f"torch {torch.__version__}",
        "context": a.context,
    }
    report["operations"] = kernels(a, hidden, layers, heads)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(a.device):
        model = BloomForCausalLM(
            BloomConfig(vocab_size=VOCAB, hidden_size=hidden, n_layer=layers, n_head=heads)
        ).eval()
    report["transformers_eager"] = alternate(
        a.rounds, lambda: own_speed(a), lambda: model_speed(a, model, False)
    )
    if a.compile:
        report["transformers_compiled"] = alternate(
            a.rounds, lambda: own_speed(a), lambda: model_speed(a, model, True)
        )
    finish(report, a.output)


main()
