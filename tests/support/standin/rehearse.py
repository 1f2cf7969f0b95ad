"""A command of nvfp4-moe as on a Blackwell machine, on the CPU: `rehearse.py [--lie NAME] COMMAND ...`.

Processes that the command starts are rehearsed, too: they find `startup/sitecustomize.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import atexit
import os
import sys
from contextlib import ExitStack
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent
VARIABLE = "NVFP4_MOE_STANDIN"
"""Of the processes that a rehearsed one starts: the lie, empty for the truth."""


def prepare(lie: str | None) -> None:
    """Install the stand-in for the rest of this process, and for those that it starts."""
    sys.path[:0] = [
        path for path in map(str, (SUPPORT, SUPPORT.parent.parent)) if path not in sys.path
    ]
    import standin

    stack = ExitStack()
    stack.enter_context(standin.installed(lie))
    atexit.register(stack.close)
    os.environ[VARIABLE] = lie or ""
    startup = str(SUPPORT / "standin" / "startup")
    paths = [startup, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lie", help="a mistake of the stand-in's, by its name in lies.py")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    prepare(options.lie)
    from nvfp4_moe.__main__ import main as run

    return run(options.command)


if __name__ == "__main__":
    sys.exit(main())
