"""Compare everything with the arrays of FlashInfer's kernels, and print a table.

    python -m oracle [--triton] [--device cuda] [--arrays FOLDER --seed N] [--every N] [--jobs N]

The exit status is 1 where something differs, and 2 for a wrong argument.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nvfp4_moe.reference import checks

from .cases import FOLDER, SEED, arrays_in
from .part import compare_part


def main() -> int:
    parser = argparse.ArgumentParser(prog="oracle", description=__doc__)
    parser.add_argument(
        "--triton", action="store_true", help="the Triton kernels, not the reference"
    )
    parser.add_argument("--device", default="cuda", help="of the Triton kernels")
    parser.add_argument("--arrays", type=Path, default=FOLDER, help="a folder of .npz or .npz.xz")
    parser.add_argument("--seed", type=int, default=SEED, help="of the inputs of those arrays")
    parser.add_argument("--every", type=int, default=1, help="take every N-th case")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, each with a part of the cases"
    )
    given = parser.parse_args()
    try:
        checks.integer("--every", given.every, 1)
        checks.integer("--jobs", given.jobs, 1)
        if given.triton:
            checks.device("--device", given.device)
    except ValueError as e:
        parser.error(str(e))
    if not arrays_in(given.arrays):
        parser.error(f"--arrays: {given.arrays} has no .npz and no .npz.xz")
    cases, elements, differing = Counter[str](), Counter[str](), Counter[str]()
    failures = []
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(compare_part, [given] * given.jobs, range(given.jobs))
        for outcome in (each for part in parts for each in part):
            cases[outcome.group] += 1
            elements[outcome.group] += outcome.elements
            differing[outcome.group] += outcome.differing
            if outcome.differing:
                failures.append(outcome)
    print(f"{'arrays':>7} {'elements':>10} {'differ':>8}")
    for group in sorted(cases):
        print(f"{cases[group]:7} {elements[group]:10} {differing[group]:8}  {group}")
    print(f"{cases.total():7} {elements.total():10} {differing.total():8}  all")
    for outcome in failures[:50]:
        print(f"  {outcome}")
    return 1 if failures or not cases else 0


if __name__ == "__main__":
    raise SystemExit(main())
