"""Writes the average of two bf16 checkpoints of the same shape: (1 - PART) * FIRST + PART * SECOND.

    python examples/average_weights.py FIRST SECOND PART OUTPUT      # names of .safetensors files

The average of a model and of what it was tuned to often keeps more of both than either does.
"""

import struct
import sys
from array import array


def read(path):
    with open(path, "rb") as f:
        data = f.read()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    halves = array("H")
    halves.frombytes(data[start:])
    floats = array("f")
    floats.frombytes(array("I", [h << 16 for h in halves]).tobytes())
    return data[:start], floats


def main():
    first, second, part, output = sys.argv[1:]
    (head, a), (other, b), part = read(first), read(second), float(part)
    if head != other or b'"BF16"' not in head or b'"F' in head:
        sys.exit(f"{first} and {second}: expected bf16 tensors of the same names and shapes")
    bits = array("I")
    bits.frombytes(array("f", [(1 - part) * x + part * y for x, y in zip(a, b)]).tobytes())
    # round to nearest, ties to even
    halves = array("H", [((x + 0x7FFF + ((x >> 16) & 1)) >> 16) & 0xFFFF for x in bits])
    with open(output, "wb") as f:
        f.write(head + halves.tobytes())


if __name__ == "__main__":
    main()
