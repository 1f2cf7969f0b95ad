"""Compare the library's time in two source trees on this GPU: `python bench/by_turns.py --before TREE`.

Two GPUs of one kind differ by up to 14 %, so that only times of the same GPU can be compared. Each tree
has a process of its own (`turns_worker.py`), which imports the package from there. Both hold a CUDA
graph of the same calls, and replay it by turns: one waits while the other runs, and every other round
begins with the other one. A line has the median microseconds of a call in both trees, the median of the
rounds' ratios of after to before with their quartiles, and whether the bytes of the outputs are equal.
Kernels are first compiled by `--jobs` other processes into Triton's cache.

The exit status is 1 if bits differ or a cell fails, and 3 without a GPU or if `--seconds` ran out.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).resolve().parent
OPERATIONS = ("moe", "quantize", "dense")
WARM_TURNS = 2
"""Rounds before those that count, in which the clocks rise."""
REPLAYS = 5
"""Measured replays of a turn."""
LAST_LINES = 15
Cell = tuple[str, str, int]
"""The operation, the shape, and the tokens or rows."""


class Failed(Exception):
    """An order failed; the message says in which tree, and why."""


@dataclass(frozen=True)
class Worker:
    """A process that measures the package of one tree."""

    name: str
    process: "subprocess.Popen[bytes]"
    errors: IO[bytes]

    def send(self, *order: object) -> None:
        """Send an order."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer will tell
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest order.

        Raises:
            SystemExit: the process has ended; the message has the last lines of its stderr.
        """
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        said = b"\n".join(self.errors.read().splitlines()[-LAST_LINES:]).decode(errors="replace")
        raise SystemExit(f"the process of {self.name} ended with exit status {status}:\n{said}")


@contextmanager
def worker_of(name: str, tree: Path) -> Iterator[Worker]:
    """Start a tree's process, and kill it at the end."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command(tree),
            bufsize=0,  # an order that nobody read is not kept
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": path},
        ) as process,
    ):
        try:
            yield Worker(name, process, errors)
        finally:
            process.kill()


def command(tree: Path) -> list[str]:
    """Return the command of a tree's process."""
    return [sys.executable, str(BENCH / "turns_worker.py"), str(tree)]


def together(workers: Sequence[Worker], *order: object) -> list[Any]:
    """Return what processes give for an order, which they carry out at the same time.

    Raises:
        Failed: one could not.
    """
    for worker in workers:
        worker.send(*order)
    answers = [(worker.name, worker.answer()) for worker in workers]
    if errors := [f"{name}: {a['error']}" for name, a in answers if "error" in a]:
        raise Failed("; ".join(errors))
    return [a["done"] for _, a in answers]


def compile_all(trees: dict[str, Path], cells: Sequence[Cell], jobs: int) -> None:
    """Prepare all cells of both trees in `jobs` processes at once, which fills Triton's cache."""
    each = min(jobs // len(trees), len(cells))
    if len(cells) < 2:  # the measuring processes compile it as fast
        return
    with ExitStack() as stack:
        started = [
            (stack.enter_context(worker_of(name, tree)), cells[i::each])
            for i in range(each)
            for name, tree in trees.items()
        ]
        for worker, share in started:
            for cell in share:
                worker.send("prepare", *cell)
        for worker, share in started:
            for _ in share:
                worker.answer()  # an error comes again where the cell is measured


def compare(workers: Sequence[Worker], cell: Cell, turns: int) -> dict[str, Any]:
    """Measure one cell by turns; `workers` are those of before and after."""
    together(workers, "prepare", *cell)
    times: list[list[float]] = [[], []]
    for turn in range(WARM_TURNS + turns):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            (replays,) = together([workers[which]], "time", REPLAYS)
            times[which].append(statistics.median(replays))
    before, after = together(workers, "finish")
    return summary(times[0][WARM_TURNS:], times[1][WARM_TURNS:]) | {"equal_bits": before == after}


def summary(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return medians of both trees' turns and of the ratios of each round, with their quartiles."""
    low, ratio, high = statistics.quantiles(
        [b / a for a, b in zip(before, after, strict=True)], n=4, method="inclusive"
    )
    return {
        "before_us": statistics.median(before),
        "after_us": statistics.median(after),
        "ratio": ratio,
        "quartiles": [low, high],
        "turns_us": [list(before), list(after)],
    }


def title(cell: Cell) -> str:
    operation, shape, tokens = cell
    return f"{operation}: {shape}, {tokens}"


def line(cell: Cell, found: dict[str, Any]) -> str:
    """Return a cell's line under the heading."""
    if "error" in found:
        return f"{title(cell):<46} FAILED: {found['error']}"
    low, high = found["quartiles"]
    return (
        f"{title(cell):<46}{found['before_us']:>10.2f}{found['after_us']:>10.2f}"
        f"{found['ratio']:>8.3f}  {low:.3f} to {high:.3f}"
        f"  {'equal' if found['equal_bits'] else 'DIFFER'}"
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="the folder of a checkout")
    parser.add_argument("--after", type=Path, default=BENCH.parent, help="default: this checkout")
    parser.add_argument("--only", choices=OPERATIONS, help="this operation only")
    parser.add_argument("--shape", action="append", help="shapes with this in their name only")
    parser.add_argument("--tokens", type=int, action="append", help="these tokens or rows only")
    parser.add_argument("--turns", type=int, default=20, help="of each tree that count")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 0, help="to compile in")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell after these")
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    return parser


def wanted(cell: Cell, options: argparse.Namespace) -> bool:
    operation, shape, tokens = cell
    return (
        options.only in (None, operation)
        and any(part.lower() in shape.lower() for part in options.shape or [""])
        and tokens in (options.tokens or [tokens])
    )


def main() -> int:
    began = time.monotonic()
    parser = arguments()
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("--turns must be at least 2")
    trees = {"before": options.before.resolve(), "after": options.after.resolve()}
    results: dict[str, Any] = {"cells": [], "not_reached": []}
    with ExitStack() as stack:
        workers = [stack.enter_context(worker_of(*tree)) for tree in trees.items()]
        sides = together(workers, "describe")
        if not all(side["gpu"] for side in sides):
            print("no CUDA device: there is nothing to measure", file=sys.stderr)
            return 3
        both = [tuple(cell) for cell in sides[0]["cells"] if cell in sides[1]["cells"]]
        cells = [cell for cell in both if wanted(cell, options)]
        if not cells:
            shapes = dict.fromkeys(shape for _, shape, _ in both)
            parser.error("both trees have no such cell; the shapes are " + ", ".join(shapes))
        results |= {key: sides[1][key] for key in ("gpu", "torch", "triton")}
        results |= {name: side["package"] for name, side in zip(trees, sides, strict=True)}
        print(*(f"{key}: {value}" for key, value in results.items() if value), sep="\n")
        compile_all(trees, cells, options.jobs)
        print(f"compiled after {time.monotonic() - began:.0f} s\n")
        print(f"{'cell':<46}{'before us':>10}{'after us':>10}{'ratio':>8}  {'quartiles':<14}  bits")
        try:
            for cell in cells:
                if time.monotonic() - began > options.seconds:
                    results["not_reached"].append(title(cell))
                    continue
                try:
                    found = compare(workers, cell, options.turns)
                except Failed as failed:
                    found = {"error": str(failed)}
                results["cells"].append({"cell": cell} | found)
                print(line(cell, found), flush=True)
        finally:  # also of a process that died
            if options.json:
                options.json.write_text(json.dumps(results, indent=1), "utf-8")
    if results["not_reached"]:
        print(f"not reached in {options.seconds:.0f} s: " + "; ".join(results["not_reached"]))
    if not all(cell.get("equal_bits") for cell in results["cells"]):
        return 1
    return 3 if results["not_reached"] else 0


if __name__ == "__main__":
    sys.exit(main())
