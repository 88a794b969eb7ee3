"""Golden PPO steps of a BLOOM with a value head, by Hugging Face transformers and PyTorch
(versions: requirements.txt).

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_ppo_model.py

Writes tests/golden/bloom/ppo/: a small policy as save_pretrained writes it;
value_head.safetensors: Linear, ReLU, Linear on the hidden state after the last layer norm;
expected.json: rollouts with what the loss takes and what the model says of each response token,
settings, losses and norms of gradients; gradients.safetensors: every gradient under the
parameter's name, with the prefix `frozen.` those that are left when all below the last layer is
frozen, and with `entropy.` and `kl.` some of the losses with these terms; after_steps.safetensors:
all parameters after three AdamW steps on the same rollouts, and with `frozen.` those that move
when the rest is frozen. Everything is computed in float32.

The gradient of a key's bias is 0 but for rounding, which Adam turns into steps of any size and
sign: the second third of each head of `query_key_value.bias` means nothing in after_steps.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

FOLDER = Path(__file__).parent / "bloom" / "ppo"
VOCABULARY, EOS, PAD = 97, 2, 3
HIDDEN, HEADS, LAYERS = 36, 6, 3
# queries' and responses' lengths, and whether the response ends with the end of sequence
SHAPES = [(5, 9, True), (1, 1, False), (12, 17, False), (7, 1, True), (3, 6, True)]
SETTINGS = {
    "clip": 0.2,
    "value_clip": 0.2,
    "vf_coef": 0.5,
    "entropy_coef": 0.01,
    "kl_coef": 0.1,
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 1e-6,
    "max_norm": 1.0,
}
# gradients that are kept of the losses with further terms
KEPT = [
    "transformer.word_embeddings.weight",
    "transformer.h.1.self_attention.query_key_value.bias",
    "transformer.h.2.mlp.dense_h_to_4h.bias",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
]

torch.manual_seed(0)
torch.set_num_threads(1)


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layer_norm_epsilon=1e-5,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        config._attn_implementation = "eager"
        self.lm = BloomForCausalLM(config).float().eval()
        self.v_head = torch.nn.Sequential(
            torch.nn.Linear(HIDDEN, 2 * HIDDEN), torch.nn.ReLU(), torch.nn.Linear(2 * HIDDEN, 1)
        )
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    p.normal_(0.0, 0.17)
                elif name.endswith("weight"):
                    p.normal_(1.0, 0.1)
                else:
                    p.normal_(0.0, 0.1)

    def parameters_by_name(self):
        """The tied LM head is no parameter of its own."""
        return {n.removeprefix("lm."): p for n, p in self.named_parameters()}

    def forward(self, query, response):
        """Log-probabilities, entropies and values of a response's tokens; the value of a token is
        that of the state before it."""
        hidden = self.lm.transformer(torch.tensor([query + response])).last_hidden_state[0]
        hidden = hidden[len(query) - 1 : -1]
        log_p = torch.log_softmax(self.lm.lm_head(hidden), -1)
        log_probs = log_p[torch.arange(len(response)), torch.tensor(response)]
        entropies = -(log_p.exp() * log_p).sum(-1)
        return log_probs, entropies, self.v_head(hidden)[:, 0]


def tokens(count):
    return torch.randint(4, VOCABULARY, (count,)).tolist()


def loss_terms(policy):
    """The means over all response tokens of the batch, and how much was clipped."""
    of = {name: [] for name in ["log_probs", "entropies", "values"]}
    for r in rollouts:
        for rows, row in zip(of.values(), policy(r["query"], r["response"])):
            rows.append(row)
    log_probs, entropies, values = (torch.cat(rows) for rows in of.values())
    given = {
        name: torch.tensor(sum((r[name] for r in rollouts), []))
        for name in [
            "old_log_probs",
            "old_values",
            "advantages",
            "returns",
            "reference_log_probs",
        ]
    }
    ratio = torch.exp(log_probs - given["old_log_probs"])
    clipped = torch.clamp(ratio, 1 - SETTINGS["clip"], 1 + SETTINGS["clip"])
    surrogate = -given["advantages"] * ratio, -given["advantages"] * clipped
    limit = SETTINGS["value_clip"]
    near = given["old_values"] + torch.clamp(values - given["old_values"], -limit, limit)
    errors = (values - given["returns"]) ** 2, (near - given["returns"]) ** 2
    log_ratio = log_probs - given["reference_log_probs"]
    return {
        "policy_loss": torch.max(*surrogate).mean(),
        "value_loss": 0.5 * torch.max(*errors).mean(),
        "entropy": entropies.mean(),
        "kl": (torch.exp(-log_ratio) - 1 + log_ratio).mean(),
        "policy_clip_fraction": (surrogate[1] > surrogate[0]).float().mean(),
        "value_clip_fraction": (errors[1] > errors[0]).float().mean(),
        "approximate_kl": 0.5 * ((log_probs - given["old_log_probs"]) ** 2).mean(),
    }


def loss_of(terms, variant):
    loss = terms["policy_loss"] + SETTINGS["vf_coef"] * terms["value_loss"]
    if variant == "entropy":
        loss = loss - SETTINGS["entropy_coef"] * terms["entropy"]
    if variant == "kl":
        loss = loss + SETTINGS["kl_coef"] * terms["kl"]
    return loss


def freeze(policy):
    """Leaves the last layer, the layer norm after it and the value head."""
    trainable = (f"transformer.h.{LAYERS - 1}.", "transformer.ln_f.", "v_head.")
    for name, p in policy.parameters_by_name().items():
        p.requires_grad_(name.startswith(trainable))


def gradients(policy, variant="plain"):
    policy.zero_grad()
    loss = loss_of(loss_terms(policy), variant)
    loss.backward()
    by_name = {
        name: p.grad.clone().contiguous()
        for name, p in policy.parameters_by_name().items()
        if p.requires_grad
    }
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9).item()
    return {"loss": loss.item(), "gradient_norm": norm}, by_name


def three_steps(policy):
    """Losses before each step and after the last, and the parameters that were to move."""
    moving = {n: p for n, p in policy.parameters_by_name().items() if p.requires_grad}
    decay = [p for p in moving.values() if p.dim() > 1]
    plain = [p for p in moving.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": SETTINGS["weight_decay"]},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=SETTINGS["learning_rate"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["epsilon"],
    )
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(loss_terms(policy), "plain")
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving.values(), SETTINGS["max_norm"])
        optimizer.step()
    losses.append(loss_of(loss_terms(policy), "plain").item())
    return losses, {name: p.detach().clone().contiguous() for name, p in moving.items()}


def prefixed(prefix, tensors):
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
policy = Policy()
policy.lm.save_pretrained(FOLDER)
(FOLDER / "generation_config.json").unlink(missing_ok=True)
save_file(prefixed("v_head", policy.v_head.state_dict()), FOLDER / "value_head.safetensors")

rollouts = []
for query, response, ends in SHAPES:
    r = {
        "query": tokens(query),
        "response": tokens(response - ends) + [EOS] * ends,
    }
    with torch.no_grad():
        log_probs, entropies, values = policy(r["query"], r["response"])
    noise = torch.randn(5, response)
    # ratios and values on both sides of both limits, with advantages of both signs
    r["old_log_probs"] = (log_probs + 0.25 * noise[0]).tolist()
    r["old_values"] = (values + 0.25 * noise[1]).tolist()
    r["advantages"] = noise[2].tolist()
    r["returns"] = (values + 0.6 * noise[3]).tolist()
    r["reference_log_probs"] = (log_probs + 0.4 * noise[4]).tolist()
    r["log_probs"], r["entropies"] = log_probs.tolist(), entropies.tolist()
    r["values"] = values.tolist()
    rollouts.append(r)

with torch.no_grad():
    terms = {name: t.item() for name, t in loss_terms(policy).items()}
assert terms["policy_clip_fraction"] > 0.1 and terms["value_clip_fraction"] > 0.1, terms
report = {"settings": SETTINGS, "rollouts": rollouts, "terms": terms}
report["plain"], full = gradients(policy)
out = dict(full)
for variant in ["entropy", "kl"]:
    report[variant], by_name = gradients(policy, variant)
    out |= prefixed(variant, {name: by_name[name] for name in KEPT})

frozen = copy.deepcopy(policy)
freeze(frozen)
report["frozen"], by_name = gradients(frozen)
assert "transformer.ln_f.weight" in by_name and "v_head.2.bias" in by_name
assert not any("embeddings" in name or ".h.0." in name for name in by_name)
for name, g in by_name.items():
    # freezing what lies below changes nothing above
    assert torch.allclose(g, full[name], rtol=1e-5, atol=1e-7), name
out |= prefixed("frozen", by_name)
save_file(out, FOLDER / "gradients.safetensors")

report["plain"]["losses"], after = three_steps(policy)
report["frozen"]["losses"], after_frozen = three_steps(frozen)
save_file(after | prefixed("frozen", after_frozen), FOLDER / "after_steps.safetensors")
(FOLDER / "expected.json").write_text(json.dumps(report) + "\n")
assert "lm_head.weight" not in load_file(FOLDER / "model.safetensors")
print({name: report[name] for name in ["terms", "plain", "entropy", "kl", "frozen"]})
