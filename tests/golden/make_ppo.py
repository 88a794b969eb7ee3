"""The arithmetic of PPO by TRL's own functions, or by PyTorch where TRL 0.11.4 has none (versions:
requirements-trl.txt).

    pip install -r tests/golden/requirements-trl.txt
    python tests/golden/make_ppo.py

Writes tests/golden/ppo.json: inputs and results of rewards of tokens, advantages and returns, the
losses with their gradients, the KL controller, the scaling of scores and the advantages of groups;
`source` says of each section which code computed it. Everything is computed in float64 from inputs
that float32 holds, except what TRL itself computes in float32. Arrays are ragged: a list a
response, without padding.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import PPOConfig, PPOTrainer
from trl.trainer.utils import AdaptiveKLController, RunningMoments

torch.manual_seed(0)
torch.set_num_threads(1)
warnings.simplefilter("ignore")


def normal(count, scale=1.0):
    return (scale * torch.randn(count)).float().double()


def like(lengths, scale=1.0):
    return [normal(n, scale) for n in lengths]


def moved(rows, scale):
    """The rows plus noise, rounded to float32."""
    return [(r + normal(len(r), scale)).float().double() for r in rows]


def padded(rows):
    return pad_sequence(rows, batch_first=True)


def mask_of(lengths):
    return padded([torch.ones(n, dtype=torch.long) for n in lengths])


def lists(rows):
    return [r.tolist() for r in rows]


def ragged(matrix, lengths):
    return [row[:n].tolist() for row, n in zip(matrix, lengths)]


def trainer(**settings):
    """A PPOTrainer for its functions: with settings, without models, data or optimizer."""
    t = object.__new__(PPOTrainer)
    t.config = PPOConfig(exp_name="golden", **settings)
    t.kl_ctl = AdaptiveKLController(t.config.init_kl_coef, t.config.target, t.config.horizon)
    return t


def log_probs_of(lengths):
    """Log-probabilities: none is above 0."""
    return [-(r.abs() + 0.01).float().double() for r in like(lengths, 2.0)]


def rewards():
    lengths = [6, 1, 9, 4]
    log_probs = log_probs_of(lengths)
    reference = [r.clamp(max=-1e-3).float().double() for r in moved(log_probs, 0.5)]
    scores = normal(len(lengths), 2.0)
    coefficient = 0.05
    masks = {
        "whole": [[1] * n for n in lengths],
        # TRL's response_masks: the score goes to the last token that counts
        "holes": [[1, 1, 0, 0, 1, 0], [1], [0, 1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0]],
    }
    out = {
        "source": "trl 0.11.4 PPOTrainer.compute_rewards; estimators by their formulas",
        "log_probs": lists(log_probs),
        "reference_log_probs": lists(reference),
        "scores": scores.tolist(),
        "kl_coefficient": coefficient,
        "masks": masks,
        "trl": {},
        "estimators": {},
    }
    for mask_name, mask in masks.items():
        mask = padded([torch.tensor(m) for m in mask])
        for penalty in ["kl", "abs", "mse"]:
            t = trainer(kl_penalty=penalty, init_kl_coef=coefficient)
            reward, non_score, kl = t.compute_rewards(
                scores, padded(log_probs), padded(reference), mask
            )
            out["trl"].setdefault(mask_name, {})[penalty] = {
                "rewards": ragged(reward, lengths),
                "kl_rewards": ragged(non_score, lengths),
                "kl": ragged(kl, lengths),
                # what the controller is told, as PPOTrainer.record_step_stats computes it
                "controller_kl": (kl * mask).sum(-1).mean().item(),
            }
    log_ratio = [a - b for a, b in zip(log_probs, reference)]
    estimators = {
        "k1": log_ratio,
        "k2": [x**2 / 2 for x in log_ratio],
        "k3": [torch.exp(-x) - 1 + x for x in log_ratio],
    }
    for name, kl in estimators.items():
        reward = [-coefficient * k for k in kl]
        for r, score in zip(reward, scores):
            r[-1] += score
        out["estimators"][name] = {"kl": lists(kl), "rewards": lists(reward)}
    # what trlX tells its controller: like k3, but with the ratio the other way up
    kl = [(torch.exp(x) - 1 - x).sum() for x in log_ratio]
    out["trlx_controller_kl"] = torch.stack(kl).mean().item()
    return out


def trlx_whiten(x, unbiased):
    """Over all entries of a padded matrix; trlX takes the biased variance if it runs on several
    processes, the unbiased one otherwise."""
    var, mean = torch.var_mean(x, unbiased=unbiased)
    return (x - mean) * torch.rsqrt(var + 1e-8)


def advantages():
    out = {
        "source": "trl 0.11.4 PPOTrainer.compute_advantages; `unwhitened`, `trlx` and "
        "`trlx_distributed` by their formulas",
        "cases": [],
    }
    shapes = [[7, 1, 12, 4, 1], [5, 5, 5], [1, 1], [30]]
    for lengths in shapes:
        for gamma, lam in [(1.0, 0.95), (0.99, 0.9)]:
            values, rewards = like(lengths), like(lengths, 0.3)
            for r in rewards:
                r[-1] += 1.5
            rewards = moved(rewards, 0.0)
            mask = mask_of(lengths)
            t = trainer(gamma=gamma, lam=lam)
            _, whitened, returns = t.compute_advantages(padded(values), padded(rewards), mask)
            t = trainer(gamma=gamma, lam=lam, whiten_rewards=True)
            _, of_whitened, returns_of_whitened = t.compute_advantages(
                padded(values), padded(rewards), mask
            )
            raw = []
            for v, r in zip(values, rewards):
                last, row = 0.0, []
                for i in reversed(range(len(v))):
                    after = v[i + 1] if i + 1 < len(v) else 0.0
                    last = r[i] + gamma * after - v[i] + gamma * lam * last
                    row.insert(0, last)
                raw.append(torch.stack(row))
            by_hand = padded([a + v for a, v in zip(raw, values)])
            assert torch.allclose(by_hand * mask, returns * mask, rtol=1e-12, atol=1e-12)
            out["cases"].append(
                {
                    "gamma": gamma,
                    "lambda": lam,
                    "values": lists(values),
                    "rewards": lists(rewards),
                    "returns": ragged(returns, lengths),
                    "unwhitened": lists(raw),
                    "trl": ragged(whitened, lengths),
                    "trlx": ragged(trlx_whiten(padded(raw), True), lengths),
                    "trlx_distributed": ragged(trlx_whiten(padded(raw), False), lengths),
                    "trl_whiten_rewards": {
                        "advantages": ragged(of_whitened, lengths),
                        "returns": ragged(returns_of_whitened, lengths),
                    },
                }
            )
    return out


def losses():
    out = {
        "source": "trl 0.11.4 PPOTrainer.loss, gradients by PyTorch",
        "gradients_of": "total = policy + vf_coef * value",
        "cases": [],
    }
    settings = [
        # how far log-probabilities move, both limits, vf_coef, the largest mean of ratios
        (0.3, 0.2, 0.2, 0.5, 10.0),
        (0.6, 0.1, 0.4, 0.1, 10.0),
        # ratios so large that TRL drops the batch, and such ratios with no limit on them
        (4.0, 0.2, 0.2, 0.5, 10.0),
        (4.0, 0.2, 0.2, 0.5, 1e9),
    ]
    vocabulary, lengths = 5, [5, 1, 8, 3]
    for step, clip, value_clip, vf_coef, threshold in settings:
        old = log_probs_of(lengths)
        log_probs = moved(old, step)
        old_values, advantages = like(lengths), like(lengths)
        values, returns = moved(old_values, 0.3), moved(old_values, 0.6)
        logits = [normal(n * vocabulary, 1.5).reshape(n, vocabulary) for n in lengths]
        new = [r.clone().requires_grad_() for r in log_probs]
        predicted = [r.clone().requires_grad_() for r in values]
        mask = mask_of(lengths)
        t = trainer(
            cliprange=clip,
            cliprange_value=value_clip,
            vf_coef=vf_coef,
            ratio_threshold=threshold,
        )
        policy, scaled_value, stats = t.loss(
            padded(old),
            padded(old_values),
            padded(logits),
            padded(predicted),
            padded(new),
            mask,
            padded(advantages),
            padded(returns),
        )
        (policy + scaled_value).backward()
        ratio = torch.exp(padded(log_probs) - padded(old))
        out["cases"].append(
            {
                "clip": clip,
                "value_clip": value_clip,
                "vf_coef": vf_coef,
                "ratio_threshold": threshold,
                "log_probs": lists(log_probs),
                "old_log_probs": lists(old),
                "values": lists(values),
                "old_values": lists(old_values),
                "advantages": lists(advantages),
                "returns": lists(returns),
                "logits": lists(logits),
                "policy_loss": policy.item(),
                "value_loss": stats["loss/value"].item(),
                "total_loss": stats["loss/total"].item(),
                "policy_clip_fraction": stats["policy/clipfrac"].item(),
                "value_clip_fraction": stats["val/clipfrac"].item(),
                "approximate_kl": stats["policy/approxkl"].item(),
                "policy_kl": stats["policy/policykl"].item(),
                "entropy": stats["policy/entropy"].item(),
                "value_error": stats["val/error"].item(),
                "mean_ratio": ((ratio * mask).sum() / mask.sum()).item(),
                "d_log_probs": lists(r.grad for r in new),
                "d_values": lists(r.grad for r in predicted),
            }
        )
    clipped = out["cases"][0]
    assert 0.1 < clipped["policy_clip_fraction"] and 0.1 < clipped["value_clip_fraction"]
    assert out["cases"][2]["total_loss"] == 0.0
    assert out["cases"][3]["mean_ratio"] > 10.0 and out["cases"][3]["total_loss"] != 0.0
    return out


def controller():
    out = {"source": "trl 0.11.4 AdaptiveKLController", "cases": []}
    # within the limit of 0.2 around the target of 6, on it, and far beyond on both sides
    kls = [6.0, 6.5, 5.5, 7.2, 4.8, 7.3, 4.7, 20.0, 600.0, 0.0, -3.0, 1.0, 6.1, 5.9]
    kls += [12.0, 0.5, 6.0, 8.0, 2.0, 100.0]
    for start, target, horizon, steps in [(0.05, 6.0, 10_000, 64), (0.2, 6.0, 500, 32)]:
        c = AdaptiveKLController(start, target, horizon)
        values = []
        for kl in kls:
            c.update(kl, steps)
            values.append(float(c.value))
        out["cases"].append(
            {
                "initial": start,
                "target": target,
                "horizon": horizon,
                "steps": steps,
                "kl": kls,
                "coefficients": values,
            }
        )
    return out


def score_scaling():
    # the first batch is 16 wide, later ones are not, and scores drift and have outliers
    batches = [normal(16, 2.0), normal(16, 0.5) + 3.0, normal(3, 8.0), normal(1), normal(32) - 5.0]
    batches = [b.float() for b in batches]
    batches[1][4], batches[2][0] = 14.0, -25.0
    out = {
        "source": "trl 0.11.4 RunningMoments, scaled and clipped as the text of PPOTrainer.step "
        "says (running it raises an error, it takes the deviation for a tensor), in float32; trlX "
        "by its formula in float64",
        "batches": lists(batches),
        "trl": [],
        "trlx": [],
    }
    for normalise, clip in [(False, None), (False, 1.5), (True, None), (True, 0.8)]:
        moments = RunningMoments(SimpleNamespace(use_distributed=False))
        case = {"use_score_norm": normalise, "score_clip": clip, "steps": []}
        for scores in batches:
            moments.update(scores)
            divisor = torch.tensor(moments.std) + torch.finfo(scores.dtype).eps
            scaled = scores - moments.mean if normalise else scores
            scaled = scaled / divisor
            if clip is not None:
                scaled = torch.clip(scaled, -clip, clip)
            case["steps"].append(
                {
                    "mean": moments.mean,
                    "std": moments.std,
                    "count": round(moments.count),
                    "scores": scaled.tolist(),
                }
            )
        out["trl"].append(case)
    # trlX clips first, so that the running moments see clipped scores, and does not subtract
    for clip in [10.0, 3.0]:
        case = {"cliprange_reward": clip, "steps": []}
        seen = torch.zeros(0, dtype=torch.float64)
        for scores in batches:
            scores = scores.double().clip(-clip, clip)
            seen = torch.cat([seen, scores])
            # moments merged batch by batch are those of all the scores so far
            std = seen.std()
            case["steps"].append(
                {"mean": seen.mean().item(), "std": std.item(), "scores": (scores / std).tolist()}
            )
        out["trlx"].append(case)
    return out


def groups():
    rewards = [
        [1.0, 2.0, 4.0, -1.0],
        [0.5, 0.5, 0.5, 0.5],
        [-0.25, 3.5, 0.0, 0.125],
        [10.0, 10.5, 9.75, 30.0],
    ]
    x = torch.tensor(rewards, dtype=torch.float64)
    baselines = (x.sum(1, keepdim=True) - x) / (x.shape[1] - 1)
    centred = x - x.mean(1, keepdim=True)
    pair = torch.tensor([[2.0, -1.0], [0.25, 0.25]], dtype=torch.float64)
    return {
        "source": "formulas of trl's RLOO and GRPO trainers, by PyTorch; deviations have Bessel's "
        "correction",
        "rewards": rewards,
        "rloo": {"baselines": baselines.tolist(), "advantages": (x - baselines).tolist()},
        "grpo": {
            "epsilon": 1e-4,
            "group": (centred / (x.std(1, keepdim=True) + 1e-4)).tolist(),
            "batch": (centred / (x.std() + 1e-4)).tolist(),
            "none": centred.tolist(),
        },
        "pairs": {
            "rewards": pair.tolist(),
            "rloo_advantages": (pair - pair.flip(1)).tolist(),
            "grpo_advantages": (
                (pair - pair.mean(1, keepdim=True)) / (pair.std(1, keepdim=True) + 1e-4)
            ).tolist(),
        },
    }


report = {
    "rewards": rewards(),
    "advantages": advantages(),
    "losses": losses(),
    "kl_controller": controller(),
    "score_scaling": score_scaling(),
    "groups": groups(),
}
path = Path(__file__).parent / "ppo.json"
# an infinity or a NaN is no JSON; none of these is meant to be here
path.write_text(json.dumps(report, allow_nan=False) + "\n")
print(path.stat().st_size, "bytes", [c["total_loss"] for c in report["losses"]["cases"]])
