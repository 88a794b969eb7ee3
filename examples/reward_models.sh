#!/bin/sh
# Makes small reward models from people's scores of images: `relevance`, how well an image fits its
# prompt; `quality`, how good Stable Diffusion 1.5's image is; and `held_out`, a second opinion on
# quality that shares neither prompts nor labels with `quality_half`, to notice when a policy has
# learnt to please the model that it was trained against.
#
#     sh examples/reward_models.sh DATA OUTPUT
#
# DATA is a folder with parti_prompts.tsv and human_scores/ (PQPP and AGIQA-3K as JSON lines). The
# models are written to OUTPUT. BPROMPT and PYTHON name the programs, should they lie elsewhere;
# Python needs numpy and scikit-learn..

set -eu
data=$1
output=$2
here=$(dirname "$0")
bprompt=${BPROMPT:-bprompt}
python=${PYTHON:-python3}

"$python" "$here/reward_labels.py" "$data" "$output/data"

# The embedded model has read prompts that are lists of styles. Captions are whole sentences, so it
# reads 8,902 plain prompts as a language model first. f32 is the faster precision for sequences as
# short as these.
printf '{raw}' > "$output/plain.txt"
"$bprompt" train sft --model embedded --template "$output/plain.txt" \
    --train "$output/data/texts.jsonl" --output "$output/trunk" \
    --learning-rate 1e-3 --epochs 3 --batch 32 --weight-decay 0.05 --beta2 0.98 --warmup 0.05 \
    --max-tokens 128 --precision f32 --save-every 0

# Fits a model to thousands of scores: fit NAME FILE LABEL SEED. A high learning rate reaches the
# vocabulary that is rare in prompts; the weight decay, which it multiplies, holds the noise back.
fit() {
    "$bprompt" train reward --model "$output/trunk" --data "$output/data/$2.jsonl" --label "$3" \
        --normalize-labels --output "$output/$1" --seed "$4" \
        --learning-rate 1.5e-3 --epochs 2.5 --batch 32 --weight-decay 1 --warmup 0.1 \
        --precision f32 --save-every 0
}

# Fits a model to the few subjects of AGIQA-3K from one that knows PQPP: tune NAME FROM FILE LABEL
# SEED.
tune() {
    "$bprompt" train reward --model "$output/$2" --data "$output/data/$3.jsonl" --label "$4" \
        --normalize-labels --output "$output/$1" --seed "$5" \
        --learning-rate 3e-4 --epochs 4 --batch 16 --weight-decay 1 --warmup 0.1 \
        --precision f32 --save-every 0
}

# Runs of different order disagree about the noise more than about the rest, so that the average of
# their weights is better than any of them.
for seed in 44 46 47; do
    fit "relevance_$seed" relevance relevance $seed
done
mkdir -p "$output/relevance"
for file in config.json generation_config.json template.txt tokenizer.json; do
    cp "$output/relevance_44/$file" "$output/relevance/"
done
"$python" "$here/average_weights.py" "$output/relevance_44/model.safetensors" \
    "$output/relevance_46/model.safetensors" 0.5 "$output/two.safetensors"
"$python" "$here/average_weights.py" "$output/two.safetensors" \
    "$output/relevance_47/model.safetensors" 0.33333 "$output/relevance/model.safetensors"

# The ancestor's labels have mean 0 and standard deviation 1, as those of its descendants have while
# they are trained.
fit preference preference score 51
tune quality preference people quality 1
tune alignment preference people alignment 1

# The pair that shares no prompt, no subject and no seed, except for the trunk.
fit preference_0 preference_0 score 52
tune quality_half preference_0 people_0 quality 2
fit preference_1 preference_1 score 53
tune held_out preference_1 people_1 quality 3
