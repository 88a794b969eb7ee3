"""Checks that what the documentation points to exists; status 1, with file and line, if not.

    python3 docs/check_links.py

Relative links have to name a file of this repository, and a heading of it if they have one. Paths
that are mentioned in passing, such as src/ops/cpu or benches/results/*.json, have to exist too;
{a,b} stands for several, and a path with a star has to match something.
"""

import itertools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "assets/model/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ["src", "kernels", "benches", "docs", "tests", "assets", "examples", ".ci"]
PATH = re.compile(rf"(?<![\w./@-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./{{}},*-]*")


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


def spelled_out(path):
    """`a/{b,c}` as `a/b` and `a/c`."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    choices = [part if at % 2 else [",".join(part)] for at, part in enumerate(parts)]
    return ["".join(c) for c in itertools.product(*choices)]


def broken_link(page, target):
    if re.match(r"[a-z]+:", target):
        return None
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return f"the link to {target} leads nowhere"
    if anchor and anchor not in anchors(path):
        return f"{name or page.name} has no heading for #{anchor}"
    return None


def missing_paths(text):
    for found in PATH.findall(text):
        # the end of a sentence is no part of a path
        for path in spelled_out(found.rstrip(".,")):
            there = any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
            if not there:
                yield f"there is no {path}"


def main():
    failed = False
    for page in sorted(p for pattern in PAGES for p in ROOT.glob(pattern)):
        for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
            wrong = [broken_link(page, target) for target in LINK.findall(line)]
            # what a link names was looked at already
            wrong += missing_paths(LINK.sub("", line))
            for message in filter(None, wrong):
                print(f"{page.relative_to(ROOT)}:{number}: {message}")
                failed = True
    return failed


sys.exit(main())
