"""The process that a tool watches: `python -m sanitizer.worker GROUP`.

Each line that it prints begins with `MARK`. It says how many cases there are, names each when the GPU
has ended it, and last names the kernels that were launched. After `--dispatch GROUP` it also says where
in their machine code Triton's dispatch of `gl.warp_specialize` is; so it does after `--reproducer FORM`,
which launches a kernel of `reproducer.py`. `--planted TOOL` launches the fault of a tool.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from . import dispatch
from .partly_written import PartlyWritten, check_results

MARK = "sanitizer:"


def say(*words: object) -> None:
    print(MARK, *words, flush=True)


def note_launches(found: set[str], compiled: dict[str, Any] | None = None) -> None:
    """Add every kernel of the library that Triton launches to `found`, by `module.name`.

    Args:
        compiled: also gets the compiled kernels, by the hash of what they were compiled from.
    """
    run = triton.JITFunction.run

    def noted(kernel: Any, *args: Any, **options: Any) -> Any:
        found.add(name_of(kernel))
        one = run(kernel, *args, **options)
        if compiled is not None:
            compiled[one.hash] = one
        return one

    triton.JITFunction.run = noted


def name_of(kernel: Any) -> str:
    """Return `module.name` of a kernel, below `nvfp4_moe.kernels`."""
    module = kernel.fn.__module__.removeprefix("nvfp4_moe.").removeprefix("kernels.")
    return f"{module}.{kernel.fn.__name__}"


def run(cases: Callable[[str], dict[str, Callable[[], Any]]], *, dispatched: bool) -> None:
    launched: set[str] = set()
    compiled: dict[str, Any] = {}
    note_launches(launched, compiled)
    made = cases("cuda")
    torch.cuda.synchronize()
    say("cases", len(made))
    for name, case in made.items():
        results = case()
        torch.cuda.synchronize()
        if isinstance(case, PartlyWritten):
            check_results(name, results)
        say("done", name)
    say("launched", *sorted(launched))
    if dispatched:
        for one in {found for kernel in compiled.values() if (found := dispatch.of(kernel))}:
            say("dispatch", one)


def main(words: list[str]) -> None:
    if words[0] == "--planted":
        from .planted import PLANTED

        run(lambda device: {words[1]: partial(PLANTED[words[1]], device)}, dispatched=False)
    elif words[0] == "--reproducer":
        from .reproducer import FORMS

        launch = FORMS[words[1]].launch
        run(lambda device: {words[1]: partial(launch, device)}, dispatched=True)
    else:
        from .cases import GROUPS

        run(GROUPS[words[-1]].cases, dispatched=words[0] == "--dispatch")


if __name__ == "__main__":
    main(sys.argv[1:])
