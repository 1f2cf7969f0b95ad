"""Try mutants and see what finds them, in a checkout: `make mutants` has the command line."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import command
from .generated.results import KEPT


def main(arguments: Sequence[str] | None = None, catalogue: command.Catalogue | None = None) -> int:
    """Run with these arguments, or those of the process; return the exit status."""
    return command.run(_parser().parse_args(arguments), catalogue or command.Catalogue())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mutants",
        description=(
            "Put the mistake of each mutant into a run of the reference, on settings scaled down "
            "from the benchmark's layers, and print which criterion sees it; then judge runs that keep "
            "the contract. Exit status: 0 if our criterion sees every mutant, at the stage where its "
            "fault is, and accepts every conforming run; else 1."
        ),
    )
    parser.add_argument("--seeds", type=int, default=3, help="inputs of each mutant (3)")
    parser.add_argument("--conforming", type=int, default=200, help="runs, at least (200)")
    parser.add_argument(
        "--kernels", action="store_true", help="the mistakes in the Triton kernels, too: minutes"
    )
    parser.add_argument("--markdown", action="store_true", help="as docs/mutants.md has it")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        type=Path,
        help="keep what is found in FILE as it is found, and do not try again what it has of the same "
        "source",
    )
    parser.add_argument(
        "--generated",
        choices=("reference", "kernels", "report"),
        help="mutants made by rule instead: of the reference, or of the Triton kernels; report: what is "
        "known of both",
    )
    parser.add_argument(
        "--results",
        metavar="FILE",
        type=Path,
        default=KEPT,
        help="of generated mutants, read and written, by any number of processes; those that it has are "
        "not tried again (results.txt beside the rules)",
    )
    parser.add_argument(
        "--merge",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="results of other machines, taken in first",
    )
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="every Nth, from the Ith on")
    parser.add_argument("--seconds", type=float, help="end after about as long")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "compile"),
        default="cpu",
        help="of the kernels (cpu: interpreted; compile: those of Gluon are compiled for sm_90, without "
        "a GPU)",
    )
    parser.add_argument(
        "--again", action="store_true", help="try those once more that survived on any device"
    )
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=[""], help="those whose name has one of these"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
