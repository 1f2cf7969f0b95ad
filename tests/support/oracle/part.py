"""A part of the comparison, for a process of its own."""

# SPDX-License-Identifier: Apache-2.0
import argparse
from dataclasses import replace

from . import compare_all
from .cases import Outcome, load
from .implementations import REFERENCE, triton


def compare_part(given: argparse.Namespace, which: int) -> list[Outcome]:
    """Compare one of `given.jobs` parts of the cases, by the arguments of `python -m oracle`."""
    ours = triton(given.device) if given.triton else REFERENCE
    golden = replace(load(given.arrays, given.seed), part=(which, given.jobs))
    return list(compare_all(golden, ours, given.every))
