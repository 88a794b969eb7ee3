"""Measurements in benches/results, and how figures and tables are written."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def number(value):
    """Three digits or all whole ones, with commas between thousands."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def percent(value, digits=0):
    return f"{100 * value:.{digits}f} %"


def markdown(rows):
    width = len(rows[0])
    assert all(len(row) == width for row in rows), rows
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * width, *lines[1:]]
