"""The process that a tool watches: `python -m sanitizer.worker GROUP`, or `--planted TOOL`.

Each line that it prints begins with `MARK`. It says how many cases there are, names each when the GPU
has ended it, and last names the kernels that were launched.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
from typing import Any

import torch
import triton

MARK = "sanitizer:"


def say(*words: object) -> None:
    print(MARK, *words, flush=True)


def note_launches(found: set[str]) -> None:
    """Add every kernel of the library that Triton launches to `found`, by `module.name`."""
    run = triton.JITFunction.run

    def noted(kernel: Any, *args: Any, **options: Any) -> Any:
        found.add(name_of(kernel))
        return run(kernel, *args, **options)

    triton.JITFunction.run = noted


def name_of(kernel: Any) -> str:
    """Return `module.name` of a kernel, below `nvfp4_moe.kernels`."""
    module = kernel.fn.__module__.removeprefix("nvfp4_moe.").removeprefix("kernels.")
    return f"{module}.{kernel.fn.__name__}"


def run(group: str) -> None:
    from .cases import GROUPS

    launched: set[str] = set()
    note_launches(launched)
    cases = GROUPS[group].cases("cuda")
    torch.cuda.synchronize()
    say("cases", len(cases))
    for name, case in cases.items():
        case()
        torch.cuda.synchronize()
        say("done", name)
    say("launched", *sorted(launched))


def main(words: list[str]) -> None:
    if words[0] == "--planted":
        from .planted import PLANTED

        say("cases", 1)
        PLANTED[words[1]]("cuda")
        torch.cuda.synchronize()
        say("done", words[1])
    else:
        run(words[0])


if __name__ == "__main__":
    main(sys.argv[1:])
