"""Runs docs/quick_start.md as one program, from a checkpoint to a training step.

The argument is the folder that it works in. What an earlier run wrote there is removed first.
"""

# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import sys
from pathlib import Path

from pages import python_blocks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quick_start.md"
MADE = ("toy", "toy-nvfp4", "mine.safetensors")
"""The names that the page writes."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name in MADE:
        if Path(name).is_dir():
            shutil.rmtree(name)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(PAGE.read_text("utf-8")):
        exec(compile(block, PAGE.name, "exec"), names)
    print(f"{', '.join(MADE)} are in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/quick_start.py DIR")
    main(Path(sys.argv[1]).absolute())
