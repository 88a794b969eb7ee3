"""Loads a folder that bprompt saved with transformers and compares log-probabilities and tokens.

    pip install -r tests/golden/requirements.txt
    python tests/golden/check_saved.py target/release/bprompt FOLDER [TEXT]
"""

import json
import subprocess
import sys

import torch
from transformers import AutoTokenizer, BloomForCausalLM

binary, folder = sys.argv[1:3]
text = (
    sys.argv[3]
    if len(sys.argv) > 3
    else "Input: an old sailor mending a net, at dawn\nOutput: an old sailor"
)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
run = [
    binary,
    "generate",
    "--model",
    folder,
    "--dtype",
    "f32",
    "--prompt",
    text,
    "--temperature",
    "0",
    "--max-tokens",
    "40",
    "--ignore-eos",
    "--json",
]
ours = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
ids = tokenizer(text).input_ids
assert ours["prompt_ids"] == ids, (ours["prompt_ids"], ids)
tensor = torch.tensor([ids])
with torch.no_grad():
    logprobs = torch.log_softmax(model(tensor).logits[0], -1)
theirs = [logprobs[i, t].item() for i, t in enumerate(ids[1:])]
worst = max(abs(a - b) for a, b in zip(ours["prompt_logprobs"], theirs))
model.generation_config.eos_token_id = None
greedy = model.generate(
    tensor,
    max_new_tokens=40,
    do_sample=False,
    repetition_penalty=1.0,
    eos_token_id=None,
    attention_mask=torch.ones_like(tensor),
    pad_token_id=3,
)[0, len(ids) :].tolist()
assert worst < 1e-3, worst
assert ours["output_ids"] == greedy, (ours["output_ids"], greedy)
print(
    f"{len(ids)} prompt tokens, 40 greedy tokens: the same; "
    f"log-probabilities differ by {worst:.1e} at most"
)
