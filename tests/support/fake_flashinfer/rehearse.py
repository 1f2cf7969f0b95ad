"""Run a command of nvfp4-moe on the CPU as on a Blackwell machine.

Use: `rehearse.py [--fault NAME] COMMAND ...`

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
VARIABLE = "NVFP4_MOE_FAKE_FLASHINFER"
"""The variable that tells the processes that are started the fault; empty for none."""


def prepare(fault: str | None) -> None:
    """Install the fake FlashInfer for the rest of this process, and for those that it starts."""
    sys.path[:0] = [
        path for path in map(str, (SUPPORT, SUPPORT.parent.parent)) if path not in sys.path
    ]
    import fake_flashinfer

    stack = ExitStack()
    stack.enter_context(fake_flashinfer.installed(fault))
    atexit.register(stack.close)
    os.environ[VARIABLE] = fault or ""
    startup = str(SUPPORT / "fake_flashinfer" / "startup")
    paths = [startup, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fault", help="a mistake of the fake FlashInfer's, by its name in faults.py"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    prepare(options.fault)
    from nvfp4_moe.__main__ import main as run

    return run(options.command)


if __name__ == "__main__":
    sys.exit(main())
