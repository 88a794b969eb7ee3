"""Writes the files that reward_models.sh trains on, from the data folder's files.

    python reward_labels.py DATA OUTPUT      # needs numpy and scikit-learn
"""

import csv
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

# Images that a subject has of each model. All are of the same prompt, so that people's scores of
# other models' images, as deviations from the mean of that model, take noise out of one score.
IMAGES = {"sd1.5": 4, "midjourney": 2, "xl2.2": 1, "DALLE2": 1, "glide": 1, "AttnGAN": 1}


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(path, records, ascii=True):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=ascii) + "\n" for r in records)


def texts(data):
    """Plain prompts for the language model, split behind their first word: `train sft` learns the
    target, and the template {raw} puts nothing around it. Held-out prompts are left out."""
    scores = data / "human_scores"
    found = [r["prompt"] for r in read(scores / "pqpp_train.jsonl")]
    found += [r["prompt"] for r in read(scores / "dsg_facts.jsonl")]
    with open(data / "parti_prompts.tsv", encoding="utf-8") as f:
        found += [r["Prompt"] for r in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    found += [r["raw_prompt"] for r in read(scores / "unigen_pairs.jsonl")]
    found += sorted({r["raw_prompt"] for r in read(scores / "agiqa3k_train.jsonl")})
    seen = {r["prompt"].strip().lower() for r in read(scores / "pqpp_validation.jsonl")}
    pairs = []
    for text in (" ".join(t.split()) for t in found):
        first, _, rest = text.partition(" ")
        if rest and len(text) <= 400 and text.lower() not in seen:
            seen.add(text.lower())
            pairs.append({"raw_prompt": first, "prompt": rest})
    random.Random(1).shuffle(pairs)
    return pairs


def softened(prompts, scores):
    """The mean of each score and of what two ridge regressions, on words and on letters, predict
    for it that were fitted without it. One score is noise in good part, and a small network learns
    the noise by heart; the prediction has less of it."""
    prompts, scores = np.array(prompts, dtype=object), np.array(scores)
    fold = np.random.RandomState(3).permutation(len(scores)) % 10
    predicted = np.zeros(len(scores))
    for options in ({"ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (2, 5)}):
        for k in range(10):
            out = fold == k
            words = TfidfVectorizer(sublinear_tf=True, **options)
            known = words.fit_transform(prompts[~out])
            ridge = Ridge(alpha=3, solver="sparse_cg").fit(known, scores[~out])
            predicted[out] += ridge.predict(words.transform(prompts[out])) / 2
    return [float(x) for x in (scores + predicted) / 2]


def standard(values):
    mean, std = statistics.mean(values), statistics.pstdev(values)
    return [(v - mean) / std for v in values]


def preference(records):
    """What the models of AGIQA-3K start from: PQPP's scores in standard deviations, SDXL's for
    twice GLIDE's, as they are nearer to Stable Diffusion's."""
    of = {k: standard([r[k] for r in records]) for k in ("sdxl_score", "glide_score")}
    both = [x + 0.5 * y for x, y in zip(of["sdxl_score"], of["glide_score"])]
    std = statistics.pstdev(both)
    prompts = [r["prompt"] for r in records]
    soft = standard(softened(prompts, [x / std for x in both]))
    return [{"prompt": p, "score": s} for p, s in zip(prompts, soft)]


def people(records):
    """A record for each subject of AGIQA-3K, in Stable Diffusion 1.5's unit. `raw_prompt` is what
    was drawn; `prompt` has its modifiers twice."""
    subjects = sorted({r["raw_prompt"] for r in records})
    random.Random(0).shuffle(subjects)
    result = [{"prompt": s} for s in subjects]
    for label in ("quality", "alignment"):
        scores = {}
        for r in records:
            of_model = scores.setdefault(r["image_model"], {})
            of_model.setdefault(r["raw_prompt"], []).append(r[label])
        unit = {m: [v for list in s.values() for v in list] for m, s in scores.items()}
        unit = {m: (statistics.mean(v), statistics.pstdev(v)) for m, v in unit.items()}
        for record in result:
            total = weight = 0
            for model, count in IMAGES.items():
                of_model = scores[model]
                if record["prompt"] in of_model:
                    mean, std = unit[model]
                    score = (statistics.mean(of_model[record["prompt"]]) - mean) / std
                    total += count * score
                    weight += count
            record[label] = unit["sd1.5"][0] + unit["sd1.5"][1] * total / weight
    return result


def main():
    data, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    pqpp = read(data / "human_scores" / "pqpp_train.jsonl")
    write(output / "texts.jsonl", texts(data), ascii=False)
    soft = softened([r["prompt"] for r in pqpp], [r["relevance"] for r in pqpp])
    write(
        output / "relevance.jsonl",
        [{"prompt": r["prompt"], "relevance": s} for r, s in zip(pqpp, soft)],
    )
    write(output / "preference.jsonl", preference(pqpp))
    subjects = people(read(data / "human_scores" / "agiqa3k_train.jsonl"))
    write(output / "people.jsonl", subjects)
    # halves that share neither subjects nor PQPP's prompts
    for k in (0, 1):
        write(output / f"preference_{k}.jsonl", preference(pqpp[k::2]))
        write(output / f"people_{k}.jsonl", subjects[k::2])


if __name__ == "__main__":
    main()
