"""`import sdeflow` beside `import torch`: seconds in fresh interpreters, and the ratio.

python benchmarks/import_time.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement):
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    seconds("import sdeflow")  # compiles, and warms the disk's cache
    torch_time, ours = [], []
    for _ in range(repeats):
        torch_time.append(seconds("import torch"))
        ours.append(seconds("import sdeflow"))
    ratio = statistics.median(b / a for a, b in zip(torch_time, ours, strict=True))
    print(
        f"import torch {statistics.median(torch_time):.2f} s, import sdeflow "
        f"{statistics.median(ours):.2f} s, median ratio {ratio:.3f} (goal: at most 1.15)"
    )


if __name__ == "__main__":
    main()
