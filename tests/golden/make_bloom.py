"""Golden BLOOM models made by Hugging Face transformers (versions: requirements.txt).

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_bloom.py

Writes tests/golden/bloom/NAME/: a checkpoint in one of the layouts users have, and
expected.safetensors / expected.json: logits, greedy continuations, and for `train` the loss, every
gradient and ten AdamW losses. Everything is computed in float32 from the stored weights.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BloomConfig, BloomForCausalLM

HERE = Path(__file__).parent / "bloom"
torch.manual_seed(0)
torch.set_num_threads(1)


def build(vocab, heads, head_size, layers, post_norm=False, tied=True, scale=0.12):
    config = BloomConfig(
        vocab_size=vocab,
        hidden_size=heads * head_size,
        n_layer=layers,
        n_head=heads,
        apply_residual_connection_post_layernorm=post_norm,
        tie_word_embeddings=tied,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layer_norm_epsilon=1e-5,
    )
    config._attn_implementation = "eager"
    model = BloomForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, scale)
            elif name.endswith("weight"):
                p.normal_(1.0, 0.1)
            else:
                p.normal_(0.0, 0.1)
    return model


def stored_as(model, dtype):
    """Rounds the weights to `dtype`; the model computes on in float32."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype).float())


def state(model, dtype, prefix=True):
    tensors = {k: v.detach().to(dtype).contiguous().clone() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if not prefix:
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    return tensors


def write_config(model, folder, dtype, old_keys=False):
    config = {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "n_layer": model.config.n_layer,
        "n_head": model.config.n_head,
        "layer_norm_epsilon": model.config.layer_norm_epsilon,
        "apply_residual_connection_post_layernorm": (
            model.config.apply_residual_connection_post_layernorm
        ),
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if old_keys:
        for new, old in [
            ("hidden_size", "n_embed"),
            ("n_layer", "num_hidden_layers"),
            ("n_head", "num_attention_heads"),
        ]:
            config[old] = config.pop(new)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def shards(tensors, count):
    names = list(tensors)
    return [{n: tensors[n] for n in names[i::count]} for i in range(count)]


def expected(model, folder, prompt):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[0]
    save_file({"logits": logits.contiguous()}, folder / "expected.safetensors")

    def greedy(penalty):
        out = model.generate(
            ids,
            max_new_tokens=48,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=3,
            attention_mask=torch.ones_like(ids),
        )
        return out[0, len(prompt) :].tolist()

    logprobs = torch.log_softmax(logits, -1)
    report = {
        "prompt_ids": prompt,
        "prompt_logprobs": [logprobs[i, t].item() for i, t in enumerate(prompt[1:])],
        "greedy": greedy(1.0),
        "greedy_penalty_1.2": greedy(1.2),
    }
    (folder / "expected.json").write_text(json.dumps(report) + "\n")


def fresh(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def tokens(count, vocab):
    return torch.randint(4, vocab, (count,)).tolist()


# one safetensors file in float32, six heads of 32, as save_pretrained writes it
folder = fresh("f32_six_heads")
model = build(160, 6, 32, 1)
model.save_pretrained(folder)
(folder / "generation_config.json").unlink(missing_ok=True)
expected(model, folder, tokens(37, 160))

# bf16, two safetensors shards with an index, untied head, no `transformer.` prefix
folder = fresh("bf16_sharded")
model = build(150, 2, 64, 2, tied=False)
stored_as(model, torch.bfloat16)
write_config(model, folder, torch.bfloat16)
index = {"metadata": {}, "weight_map": {}}
for i, shard in enumerate(shards(state(model, torch.bfloat16, prefix=False), 2)):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    index["weight_map"] |= {name: file for name in shard}
(folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
expected(model, folder, tokens(21, 150))

# f16, two PyTorch zip files with an index, residual after the layer norm, old key names
folder = fresh("f16_pytorch_sharded")
model = build(140, 2, 80, 1, post_norm=True)
stored_as(model, torch.float16)
write_config(model, folder, torch.float16, old_keys=True)
index = {"metadata": {}, "weight_map": {}}
for i, shard in enumerate(shards(state(model, torch.float16), 2)):
    file = f"pytorch_model-{i + 1:05}-of-00002.bin"
    torch.save(shard, folder / file)
    index["weight_map"] |= {name: file for name in shard}
(folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
expected(model, folder, tokens(18, 140))

# bf16 in one PyTorch file, three heads of 96
folder = fresh("bf16_pytorch")
model = build(130, 3, 96, 1)
stored_as(model, torch.bfloat16)
write_config(model, folder, torch.bfloat16)
torch.save(state(model, torch.bfloat16), folder / "pytorch_model.bin")
expected(model, folder, tokens(50, 130))

# loss, gradients and ten AdamW steps
folder = fresh("train")
model = build(120, 2, 32, 2, post_norm=False)
write_config(model, folder, torch.float32)
save_file(state(model, torch.float32), folder / "model.safetensors", metadata={"format": "pt"})
sequences = [(tokens(23, 120), 9), (tokens(70, 120), 30), (tokens(5, 120), 1)]


def batch_loss():
    total, count = 0.0, 0
    for ids, start in sequences:
        labels = torch.tensor([-100] * start + ids[start:])
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=-100, reduction="sum"
        )
        count += len(ids) - start
    return total / count


loss = batch_loss()
loss.backward()
gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n != "lm_head.weight"}
save_file({k: v.contiguous() for k, v in gradients.items()}, folder / "gradients.safetensors")
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
decay = [p for p in model.parameters() if p.dim() > 1]
plain = [p for p in model.parameters() if p.dim() == 1]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
    lr=1e-3,
    betas=(0.9, 0.95),
    eps=1e-8,
)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    loss = batch_loss()
    losses.append(loss.item())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
report = {
    "sequences": [{"ids": i, "loss_from": s} for i, s in sequences],
    "gradient_norm": norm,
    "losses": losses,
}
(folder / "expected.json").write_text(json.dumps(report) + "\n")
print("losses", losses, "gradient norm", norm)
