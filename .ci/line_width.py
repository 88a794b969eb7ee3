"""Names the lines of tracked sources that have more than 100 characters; status 1 if there are."""

import pathlib
import subprocess
import sys

WIDTH = 100
SOURCES = ["*.rs", "*.cu", "*.cuh", "*.h", "*.py"]


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-z", "--", *SOURCES], check=True, capture_output=True
    )
    failed = False
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = root / name
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            if len(line) > WIDTH:
                print(f"{name}:{number}: {len(line)} characters, {WIDTH} are the limit")
                failed = True
    return failed


sys.exit(main())
