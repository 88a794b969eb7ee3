"""Serving BLOOM-1b1 bf16 on the CPU: bprompt serve compared with llama-server, in turn, under the
same load; and with the bare engine.

llama-server is built as llama_cpp.py says, with --target llama-server. Both get random weights of
the same shape, a vocabulary of made-up words, and prompts of random token ids.

    python benches/peers/serving.py --llama-bin build/bin --output FILE
"""

import argparse
import json
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import urllib.request

import gguf
import numpy as np

from common import alternate, finish, llm
from llama_cpp import HIDDEN, HEADS, LAYERS, VOCAB, write_model

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def bytes_as_letters():
    """How byte-level vocabularies write the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def words():
    """A vocabulary of BLOOM's size."""
    fixed = SPECIAL + bytes_as_letters()
    return fixed + [f"Ġw{i}" for i in range(VOCAB - len(fixed))]


def vocabulary_of_gguf(w):
    tokens = words()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("bloom")
    w.add_token_list(tokens)
    w.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    w.add_token_merges(["Ġ w"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def write_folder(folder):
    """The same shape as Hugging Face writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "seq_length": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {token: i for i, token in enumerate(words())}
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(SPECIAL)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shapes = {"word_embeddings.weight": [VOCAB, HIDDEN]}
    for norm in ["word_embeddings_layernorm", "ln_f"]:
        shapes |= {f"{norm}.weight": [HIDDEN], f"{norm}.bias": [HIDDEN]}
    for i in range(LAYERS):
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            shapes |= {f"h.{i}.{norm}.weight": [HIDDEN], f"h.{i}.{norm}.bias": [HIDDEN]}
        for name, rows, cols in [
            ("self_attention.query_key_value", 3 * HIDDEN, HIDDEN),
            ("self_attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN),
            ("mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN),
        ]:
            shapes |= {f"h.{i}.{name}.weight": [rows, cols], f"h.{i}.{name}.bias": [rows]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[f"transformer.{name}"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    rng = np.random.default_rng(1)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                # no row twice: equal logits would all be won by the first token, a special one
                noise = ((rng.random(min(left, 1 << 24), dtype=np.float32) - 0.5) * 0.07).view(
                    np.uint32
                )
                left -= f.write((noise >> 16).astype(np.uint16).tobytes()) // 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, command, port):
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health")
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{command[0]} did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--llama-bin", type=pathlib.Path, required=True)
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--models", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    p.add_argument("--output")
    a = p.parse_args()
    file, folder = a.models / "bloom-1b1-vocabulary.gguf", a.models / "bloom-1b1-folder"
    if not file.exists():
        write_model(file, gguf.GGMLQuantizationType.BF16, vocabulary_of_gguf)
    if not (folder / "model.safetensors").exists():
        write_folder(folder)

    def load(url):
        command = [
            a.bprompt,
            "bench",
            "serve",
            "--base-url",
            url,
            "--random-input-len",
            "16",
            "--random-vocabulary",
            str(VOCAB),
            "--output-len",
            "32",
            "--num-prompts",
            "32",
            "--max-concurrency",
            "16",
            "--json",
        ]
        report = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        assert report["failed"] == 0, report["error"]
        return {
            "output_throughput": report["output_throughput"],
            "ttft_ms": report["ttft_ms"]["median"],
            "itl_ms": report["itl_ms"]["median"],
        }

    def ours():
        port = free_port()
        command = [
            a.bprompt,
            "serve",
            "--port",
            port,
            "--model",
            folder,
            "--device",
            "cpu",
            "--threads",
            a.threads,
            "--sequences",
            16,
            "--log",
            "error",
            # what random weights say repeats itself, which drafts would guess
            "--draft-tokens",
            0,
        ]
        with Server(command, port) as server:
            return load(server.url)

    def theirs():
        port = free_port()
        command = [
            a.llama_bin / "llama-server",
            "-m",
            file,
            "--port",
            port,
            "-t",
            a.threads,
            "-np",
            16,
            "-c",
            2048,
            "--no-webui",
        ]
        with Server(command, port) as server:
            return load(server.url)

    def bare():
        # the engine alone on the same prompts and lengths: two waves of sixteen
        r = llm(a.bprompt, "bf16", 16, 32, 16, 1, a.threads)
        seconds = (r["prefill"]["milliseconds"] + 32 * r["decode"]["milliseconds"]) / 1e3
        return {"output_throughput": 16 * 33 / seconds}

    report = {
        "shape": "bloom-1b1 bf16",
        "threads": a.threads,
        "streams": 16,
        "prompt_tokens": 16,
        "output_tokens": 32,
        "peer": "llama-server of llama-cpp-python 0.3.36",
        "beside_llama_server": alternate(a.rounds, ours, theirs),
        "beside_bare_engine": alternate(
            a.rounds, lambda: {"output_throughput": ours()["output_throughput"]}, bare
        ),
    }
    finish(report, a.output)


main()
