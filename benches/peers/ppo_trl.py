"""Rounds of PPO on the CPU: bprompt compared with TRL's PPOTrainer, in turn, on the same shape,
with random weights and a score that costs nothing.

A round is 64 rollouts of 32 prompt tokens and 128 new ones, sampled without an end, and 4 epochs of
updates on them. The reference is a model of its own and all layers are trained. Batches and
coefficients are those of EasyNLP's recipe where TRL has them: chunks of 16 rollouts, minibatches
of 4, an update every 2. TRL's value head is one linear layer, and its scaling of scores by their
running deviation raises an error in this version.

    pip install -r tests/golden/requirements-trl.txt
    python benches/peers/ppo_trl.py --output FILE

With --alone only TRL runs.
"""

import argparse
import statistics
import time
import warnings

import tokenizers
import torch
import transformers
import trl
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from common import alternate, bprompt, finish

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def tokenizer(vocabulary):
    """PPOTrainer pads with a tokenizer's ids; it reads no text here."""
    words = list(SPECIAL.values())
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **SPECIAL)


def build(a):
    config = BloomConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        n_layer=a.layers,
        n_head=a.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = AutoModelForCausalLMWithValueHead(BloomForCausalLM(config))
    # what from_pretrained sets, and the wrapper's own functions read
    model.is_peft_model = False
    # all rollouts get the same length, so that the work does not depend on what is sampled
    model.pretrained_model.generation_config.eos_token_id = None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-6
    )
    settings = PPOConfig(
        exp_name="ppo_trl",
        batch_size=a.rollouts,
        mini_batch_size=a.minibatch,
        gradient_accumulation_steps=a.accumulation,
        ppo_epochs=a.epochs,
        init_kl_coef=0.05,
        target=6.0,
        horizon=10_000.0,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.5,
        max_grad_norm=1.0,
        score_clip=10.0,
        accelerator_kwargs={
            "cpu": True,
            "mixed_precision": "bf16" if a.precision == "bf16" else "no",
        },
    )
    # without a reference it takes a copy of the model
    return PPOTrainer(settings, model, tokenizer=tokenizer(a.vocab), optimizer=optimizer)


def score(response):
    """The share of even ids: something to learn, at no cost."""
    return (response % 2 == 0).float().mean()


def generate(a, trainer, queries, new_tokens):
    # accelerate casts the forward pass of training only
    with torch.autocast("cpu", torch.bfloat16, enabled=a.precision == "bf16"):
        return trainer.generate(
            queries,
            batch_size=a.chunk,
            return_prompt=False,
            remove_padding=False,
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=3,
        )


def one_round(a, trainer):
    """Seconds of a round's parts."""
    queries = list(torch.randint(4, a.vocab, (a.rollouts, a.prompt_tokens)))
    started = time.perf_counter()
    responses = generate(a, trainer, queries, a.new_tokens)
    assert all(len(r) == a.new_tokens for r in responses)
    generated = time.perf_counter()
    stats = trainer.step(queries, responses, [score(r) for r in responses])
    ended = time.perf_counter()
    return {
        "generate": generated - started,
        "step": ended - generated,
        "step_forward": float(stats["time/ppo/forward_pass"]),
        "step_optimize": float(stats["time/ppo/optimize_step"]),
        "total": ended - started,
    }


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bprompt", default="target/release/bprompt")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    p.add_argument("--vocab", type=int, default=6144)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--rollouts", type=int, default=64)
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--chunk", type=int, default=16, help="rollouts that are sampled at a time")
    p.add_argument("--minibatch", type=int, default=4, help="rollouts of a forward pass")
    p.add_argument("--accumulation", type=int, default=2, help="minibatches of an update")
    p.add_argument("--alone", action="store_true", help="run TRL only")
    p.add_argument("--output")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    shape = ["vocab", "hidden", "layers", "heads"]
    work = [
        "rollouts",
        "prompt_tokens",
        "new_tokens",
        "epochs",
        "chunk",
        "minibatch",
        "accumulation",
    ]
    trainer = build(a)
    generate(a, trainer, list(torch.randint(4, a.vocab, (a.chunk, a.prompt_tokens))), 4)
    seconds = []

    def theirs():
        seconds.append(one_round(a, trainer))
        return {a.precision: a.rollouts / seconds[-1]["total"]}

    def ours():
        flags = ["--minibatch", str(a.minibatch * a.accumulation)]
        work_of_ours = [name for name in work if name not in ("chunk", "minibatch", "accumulation")]
        for name in [*shape, *work_of_ours, "precision", "threads"]:
            flags += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
        return {a.precision: bprompt(a.bprompt, "ppo", *flags)["rollouts_per_second"]}

    report = {
        "shape": {name: getattr(a, name) for name in shape},
        "round": {name: getattr(a, name) for name in work},
        "threads": a.threads,
        "peer": f"trl {trl.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }
    if a.alone:
        rates = [theirs()[a.precision] for _ in range(a.rounds)]
        report["rollouts_per_second"] = {a.precision: {"theirs": statistics.median(rates)}}
    else:
        report["rollouts_per_second"] = alternate(a.rounds, ours, theirs)
    report["their_seconds"] = {
        name: statistics.median(s[name] for s in seconds) for name in seconds[0]
    }
    finish(report, a.output)


main()
