"""Counts of transformers' CLIPTokenizer.

    python make_clip.py FOLDER

FOLDER holds a CLIP tokenizer (vocab.json, merges.txt).
"""

import json
import pathlib
import sys

from transformers import CLIPTokenizerFast

TEXTS = [
    "",
    "a cat",
    "A cat in the rain, highly detailed, 8k, trending on ArtStation",
    "  spaces \t and\nlines  ",
    "(masterpiece:1.2), ((best quality)), [blurry], <lora:film grain:0.8> BREAK portrait",
    "it's the cat's, they'll say we've 35mm f/1.8 — 1girl, 100%",
    "café naïve Ångström 東京の夜, ночь, 🌧️🐈",
    "e\u0301 NFC",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "!!! ... ,,, ,, --- ??",
    "<|startoftext|> hello <|endoftext|>",
    "x" * 200,
]

tokenizer = CLIPTokenizerFast.from_pretrained(sys.argv[1])
counts = [[text, len(tokenizer(text).input_ids)] for text in TEXTS]
out = pathlib.Path(__file__).parent / "clip_tokens.json"
out.write_text(json.dumps(counts, ensure_ascii=True, indent=0) + "\n")
