"""Shared code of the speed tables: their arguments, and where their results go.

Importing it makes `nvfp4_moe` importable from a checkout that was never installed. The clocks are in
`nvfp4_moe/bench/clock.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
DEVICE = torch.device("cuda")


def arguments(description: str) -> argparse.ArgumentParser:
    """The parser of a script: the first line of its docstring, and `--json`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    return parser


def count(text: str) -> int:
    """An argument that is an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer from 1")
    return int(text)


def start(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, object]]:
    """(options, where it runs, printed).

    Raises:
        SystemExit: there is no GPU, or the arguments are wrong.
    """
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure")
    where: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(*where.values(), sep=", ")
    return options, where


def save(path: Path | None, results: dict[str, object]) -> None:
    """Write a script's results where `--json` says, if it does."""
    if path:
        path.write_text(json.dumps(results, indent=1), "utf-8")
