"""BLOOM-1b1 on the CPU: bprompt compared with llama.cpp, in turn, on random weights of the same
shape.

    # brings llama.cpp's source
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    cmake -B build -DGGML_NATIVE=ON vendor/llama.cpp
    cmake --build build --target llama-bench llama-batched-bench
    pip install gguf==0.19.0
    python benches/peers/llama_cpp.py --llama-bin build/bin --output FILE
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import gguf
import numpy as np

from common import alternate, finish, llm

HIDDEN, LAYERS, HEADS, VOCAB = 1536, 24, 16, 250_880


def write_model(
    path, kind, add_vocabulary=lambda w: w.add_string("tokenizer.ggml.model", "no_vocab")
):
    """A GGUF file of random weights; matrices in `kind`, vectors in f32."""
    w = gguf.GGUFWriter(path, "bloom")
    w.add_context_length(2048)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(4 * HIDDEN)
    w.add_block_count(LAYERS)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_layer_norm_eps(1e-5)
    w.add_vocab_size(VOCAB)
    add_vocabulary(w)
    rng = np.random.default_rng(1)

    def matrix(name, rows, cols):
        # a block of noise, repeated: speed does not depend on the values
        noise = (rng.random((256, cols), dtype=np.float32) - 0.5) * 0.07
        quantized = gguf.quants.quantize(noise, kind)
        data = np.tile(quantized, (rows // 256 + 1, 1))[:rows]
        w.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)

    def vector(name, n):
        w.add_tensor(
            name,
            (rng.random(n, dtype=np.float32) - 0.5) * 0.1
            + float("norm" in name and "weight" in name),
        )

    def norm(name):
        vector(f"{name}.weight", HIDDEN)
        vector(f"{name}.bias", HIDDEN)

    matrix("token_embd.weight", VOCAB, HIDDEN)
    norm("token_embd_norm")
    norm("output_norm")
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for part, rows, cols in [
            ("attn_qkv", 3 * HIDDEN, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_up", 4 * HIDDEN, HIDDEN),
            ("ffn_down", HIDDEN, 4 * HIDDEN),
        ]:
            matrix(f"blk.{i}.{part}.weight", rows, cols)
            vector(f"blk.{i}.{part}.bias", rows)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--llama-bin", type=pathlib.Path, required=True)
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--models", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    p.add_argument("--output")
    a = p.parse_args()
    report = {
        "shape": "bloom-1b1",
        "threads": a.threads,
        "peer": "llama.cpp of llama-cpp-python 0.3.36",
    }
    for ours, kind in [
        ("bf16", gguf.GGMLQuantizationType.BF16),
        ("int8", gguf.GGMLQuantizationType.Q8_0),
    ]:
        model = a.models / f"bloom-1b1-{kind.name}.gguf"
        if not model.exists():
            write_model(model, kind)

        def bench():
            run = [
                a.llama_bin / "llama-bench",
                "-m",
                model,
                "-p",
                "128",
                "-n",
                "16",
                "-t",
                str(a.threads),
                "-r",
                "2",
                "-o",
                "json",
            ]
            rows = json.loads(
                subprocess.run(run, check=True, capture_output=True, text=True).stdout
            )
            return {
                "prefill_128": next(r["avg_ts"] for r in rows if r["n_prompt"]),
                "decode_1": next(r["avg_ts"] for r in rows if r["n_gen"]),
            }

        def own():
            r = llm(a.bprompt, ours, 128, 16, 1, 2, a.threads)
            own.memory = r["peak_memory_bytes"]
            own.fraction = {k: r[k]["fraction"] for k in ("prefill", "decode")}
            return {
                "prefill_128": r["prefill"]["tokens_per_second"],
                "decode_1": r["decode"]["tokens_per_second"],
            }

        report[ours] = alternate(a.rounds, own, bench)
        report[ours]["fraction_of_floor"] = own.fraction
        report[ours]["peak_memory_bytes"] = own.memory

        def bench16():
            run = [
                a.llama_bin / "llama-batched-bench",
                "-m",
                model,
                "-c",
                "1024",
                "-npp",
                "16",
                "-ntg",
                "16",
                "-npl",
                "16",
                "-t",
                str(a.threads),
                "--output-format",
                "jsonl",
            ]
            out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
            rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            return {"decode_16": rows[-1]["speed_tg"]}

        def own16():
            return {
                "decode_16": llm(a.bprompt, ours, 16, 16, 16, 1, a.threads)["decode"][
                    "tokens_per_second"
                ]
            }

        report[ours] |= alternate(a.rounds, own16, bench16)
    finish(report, a.output)


if __name__ == "__main__":
    main()
