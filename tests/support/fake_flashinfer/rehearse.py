"""Run a command of nvfp4-moe on the CPU as on a Blackwell machine.

Use: `rehearse.py [--fault NAME] COMMAND ...`

Processes that the command starts are rehearsed, too: they find `startup/sitecustomize.py`. The
comparisons of `blackwell` are forked from this process instead, which has imported everything, because
imports would take most of their time.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import atexit
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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


def forked(arguments: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run the command line in a fork of this process; return its exit status and what it printed."""
    import torch

    from nvfp4_moe.__main__ import main as command_line

    sys.stdout.flush()
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                os.environ.clear()
                os.environ.update(environment)
                torch.set_num_threads(1)  # a pool of threads does not outlive a fork
                status = command_line(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return status, printed.read().decode("utf-8", "replace")


def fork_comparisons() -> None:
    """Let `blackwell` fork its comparisons from this process for the rest of it."""
    from nvfp4_moe.cli import blackwell, diff  # noqa: F401  imported once for all
    from nvfp4_moe.differential import workers

    started = workers.run

    def run(command: Sequence[str], timeout: float | None = None, **options: Any) -> Any:
        if tuple(command[:4]) == (*blackwell.CHILD, "diff"):
            return forked(command[3:], options["env"])
        return started(command, timeout, **options)

    workers.run = run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fault", help="a mistake of the fake FlashInfer's, by its name in faults.py"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    prepare(options.fault)
    fork_comparisons()
    from nvfp4_moe.__main__ import main as run

    return run(options.command)


if __name__ == "__main__":
    sys.exit(main())
