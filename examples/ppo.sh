#!/bin/sh
# Trains the embedded model on the reward models of reward_models.sh, by PPO with three seeds, and
# measures each policy on held-out prompts.
#
#     sh examples/ppo.sh MODELS PROMPTS HELD_OUT OUTPUT
#
# MODELS is what reward_models.sh wrote; PROMPTS and HELD_OUT are text files with a plain prompt a
# line. BPROMPT names the program, should it lie elsewhere.

set -eu
models=$1
prompts=$2
held_out=$3
output=$4
bprompt=${BPROMPT:-bprompt}
mkdir -p "$output"

# The two models have units of their own, so each counts in standard deviations. Without fidelity a
# policy may forget what was asked for as long as it pleases the others.
rewards="--normalize-rewards --reward $models/quality:0.7 --reward $models/relevance:0.3"

# A round on the held-out prompts that changes nothing: its line of metrics.jsonl has the rewards,
# kept meaning and distinct-2 of one rewrite a prompt.
measure() {
    # shellcheck disable=SC2086
    "$bprompt" train ppo --policy "$1" --prompts "$held_out" --output "$2" $rewards \
        --watch "$models/held_out" --rounds 1 --rollouts 300 --minibatch 300 --ppo-epochs 1 \
        --unfrozen-layers 1 --learning-rate 1e-12 --max-new-tokens 64 --samples 30
}

measure embedded "$output/measured_embedded"
for seed in 1 2 3; do
    # shellcheck disable=SC2086
    "$bprompt" train ppo --policy embedded --prompts "$prompts" --output "$output/policy_$seed" \
        $rewards --reward fidelity:0.5 --watch "$models/held_out" --seed "$seed" \
        --max-new-tokens 64 --unfrozen-layers 3 --minibatch 32 --learning-rate 2e-4 --rounds 24 \
        --kl-target 10 --kl-coefficient 0.1 --kl-horizon 1000 --entropy-coefficient 0.02
    measure "$output/policy_$seed" "$output/measured_$seed"
done
