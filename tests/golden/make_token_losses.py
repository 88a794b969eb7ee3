"""Losses at an LM head and their gradients by PyTorch (versions: requirements.txt).

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_token_losses.py

Writes tests/golden/token_losses.safetensors: hidden states, an LM head, labels and what each loss
takes, and of each loss its value and its gradients. Everything is computed in float64 from inputs
that float32 holds, and stored in float32, but for the values of the losses.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

LABELS, WIDTH, VOCABULARY = 12, 8, 131
CLIP, KL, ENTROPY, BETA = 0.2, 0.3, 0.05, 0.4

torch.manual_seed(0)
torch.set_num_threads(1)


def normal(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).float().double()


inputs = {
    "x": normal(LABELS, WIDTH),
    "head": normal(VOCABULARY, WIDTH, scale=0.9),
    "advantages": normal(LABELS),
}
targets = torch.randint(0, VOCABULARY, (LABELS,))


def statistics(x, head):
    """Log-probabilities of the labels, and entropies."""
    log_p = torch.log_softmax(x @ head.T, -1)
    return log_p[torch.arange(LABELS), targets], -(log_p.exp() * log_p).sum(-1)


log_probs, entropies = statistics(inputs["x"], inputs["head"])
# ratios on both sides of both limits, with advantages of both signs, and one that is exactly 1
offsets = torch.tensor([-0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 0.0, 0.25, -0.25, 0.15, -0.5, 0.5])
inputs["old"] = (log_probs + offsets).float().double()
inputs["reference"] = (log_probs + normal(LABELS, scale=0.7)).float().double()
# pairs for DPO: labels 0..3 are preferred to 3..7, and 7..9 to 9..12
pairs = [(range(0, 3), range(3, 7)), (range(7, 9), range(9, 12))]


def surrogate(log_probs):
    ratio = torch.exp(log_probs - inputs["old"])
    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    return torch.max(-ratio * inputs["advantages"], -clipped * inputs["advantages"])


def cross_entropy(x, head):
    return torch.nn.functional.cross_entropy(x @ head.T, targets, reduction="sum")


def ppo(x, head):
    return surrogate(statistics(x, head)[0]).sum()


def ppo_with_penalties(x, head):
    log_probs, entropies = statistics(x, head)
    log_ratio = log_probs - inputs["reference"]
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    return (surrogate(log_probs) + KL * k3 - ENTROPY * entropies).sum()


def dpo(x, head):
    """With a term of entropies, so that both kinds of given gradients are there."""
    log_probs, entropies = statistics(x, head)
    log_ratio = log_probs - inputs["reference"]
    margins = [log_ratio[list(a)].sum() - log_ratio[list(b)].sum() for a, b in pairs]
    loss = -sum(torch.nn.functional.logsigmoid(BETA * m) for m in margins)
    return loss + (inputs["advantages"] * entropies).sum()


out = {name: t.float().contiguous() for name, t in inputs.items()}
out["targets"] = targets
out["log_probs"], out["entropies"] = log_probs.float(), entropies.float()
for loss_of in [cross_entropy, ppo, ppo_with_penalties, dpo]:
    x, head = (inputs[name].clone().requires_grad_() for name in ["x", "head"])
    loss = loss_of(x, head)
    loss.backward()
    name = loss_of.__name__
    out[f"{name}.loss"] = loss.detach().reshape(1)
    out[f"{name}.dx"], out[f"{name}.dhead"] = x.grad.float(), head.grad.float()
    print(name, loss.item())
save_file(out, Path(__file__).parent / "token_losses.safetensors")
