"""A golden reward model made by Hugging Face transformers (versions: requirements.txt).

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_reward.py

Writes tests/golden/bloom/reward/: a small BloomForSequenceClassification with one score, as
save_pretrained writes it; expected.json: sequences with the score that each gets alone, the mean
squared error against labels, the loss of pairs, the norms of both gradients and the losses of ten
AdamW steps on the squared error; gradients.safetensors: every gradient of the squared error under
the parameter's name, and of the loss of pairs under `pairwise.` and the name. Everything is
computed in float32.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForSequenceClassification

FOLDER = Path(__file__).parent / "bloom" / "reward"
VOCABULARY, EOS, PAD = 97, 2, 3
HIDDEN, HEADS, LAYERS = 24, 6, 3

torch.manual_seed(0)
torch.set_num_threads(1)


def build():
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
        num_labels=1,
    )
    config._attn_implementation = "eager"
    model = BloomForSequenceClassification(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.2)
            elif name.endswith("weight"):
                p.normal_(1.0, 0.1)
            else:
                p.normal_(0.0, 0.1)
    return model


def tokens(count):
    return torch.randint(4, VOCABULARY, (count,)).tolist()


def scores():
    """The score of each sequence alone, without padding."""
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in sequences])


def padded_scores(side):
    """The scores of one padded batch with its attention mask."""
    longest = max(map(len, sequences))
    ids, mask = [], []
    for s in sequences:
        fill, ones = [PAD] * (longest - len(s)), [1] * len(s)
        zeros = [0] * len(fill)
        ids.append(s + fill if side == "right" else fill + s)
        mask.append(ones + zeros if side == "right" else zeros + ones)
    return model(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=labels)


def pairwise(s):
    chosen, rejected = s[[a for a, _ in pairs]], s[[b for _, b in pairs]]
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def squared_error(s):
    return ((s - labels) ** 2).mean()


def gradients(loss_of):
    """Loss, gradients by name, and the norm of all of them."""
    model.zero_grad()
    loss = loss_of(scores())
    loss.backward()
    by_name = {name: p.grad.clone().contiguous() for name, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    return loss.item(), by_name, norm


shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
model = build()
model.save_pretrained(FOLDER)

# some have the end of sequence inside, some at the end, some both, one is nothing but it
sequences = [
    tokens(1),
    tokens(7),
    tokens(12) + [EOS],
    tokens(3) + [EOS] + tokens(5),
    tokens(40),
    [EOS],
    tokens(4) + [EOS] + tokens(13) + [EOS],
    tokens(25),
    tokens(38) + [EOS],
]
labels = torch.tensor([0.5, -1.25, 2.0, 0.0, -0.75, 1.5, -2.5, 0.25, 1.0])
# sequences may be in several pairs, and on both sides
pairs = [[0, 1], [2, 3], [4, 7], [8, 6], [3, 4], [7, 5]]

with torch.no_grad():
    alone = scores()
    for side in ["right", "left"]:
        batch = padded_scores(side)
        worst = (batch.logits[:, 0] - alone).abs().max().item()
        assert worst < 1e-5, (side, worst)
        # the loss that transformers itself takes for one label
        assert abs(batch.loss.item() / squared_error(alone).item() - 1) < 1e-5, side

mse_loss, of_mse, mse_norm = gradients(squared_error)
pairwise_loss, of_pairs, pairwise_norm = gradients(pairwise)
save_file(
    of_mse | {f"pairwise.{name}": g for name, g in of_pairs.items()},
    FOLDER / "gradients.safetensors",
)

# the score's weight is a matrix, so it decays
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
    loss = squared_error(scores())
    losses.append(loss.item())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

report = {
    "sequences": [{"ids": ids, "score": s} for ids, s in zip(sequences, alone.tolist())],
    "labels": labels.tolist(),
    "mse_loss": mse_loss,
    "gradient_norm": mse_norm,
    "pairs": pairs,
    "pairwise_loss": pairwise_loss,
    "pairwise_gradient_norm": pairwise_norm,
    "losses": losses,
}
(FOLDER / "expected.json").write_text(json.dumps(report) + "\n")
assert "score.weight" in load_file(FOLDER / "model.safetensors")
print("scores", alone.tolist(), "loss", mse_loss, "of pairs", pairwise_loss, "losses", losses)
