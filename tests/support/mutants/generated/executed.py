"""Lines of the kernels that a probe executes in the interpreter: no other line's mutant can it see."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from ..edited_copy import KERNELS
from .rules import Generated
from .trial import Probe

Lines = frozenset[tuple[str, int]]
"""Files, such as "kernels/jit/load.py", with the numbers of lines."""


@functools.cache
def _file(code: CodeType) -> str | None:
    """Return the file of a kernel or a device function."""
    path = Path(code.co_filename).resolve()
    return path.relative_to(KERNELS.parent).as_posix() if KERNELS in path.parents else None


def recording(probe: Probe, path: Path) -> Probe:
    """The probe, which also writes the lines that it executes into a file."""

    def run() -> Iterator[str]:
        lines: set[tuple[str, int]] = set()

        def of_function(frame: FrameType, event: str, arg: Any) -> Any:
            file = _file(frame.f_code)

            def of_line(frame: FrameType, event: str, arg: Any) -> Any:
                if file is not None:
                    lines.add((file, frame.f_lineno))
                return of_line

            return None if file is None else of_line(frame, event, arg)

        sys.settrace(of_function)
        try:
            wrong = list(probe())
        finally:
            sys.settrace(None)
        path.write_text(json.dumps(sorted(lines)), "utf-8")
        yield from wrong

    return run


def read(path: Path) -> Lines:
    return frozenset((file, line) for file, line in json.loads(path.read_text("utf-8")))


def executes(lines: Lines, mutant: Generated) -> bool:
    """Return True if a mutant's change is among the lines; a constant may be used by any."""
    if mutant.lines is None:
        return True
    first, last = mutant.lines
    return any((mutant.file, line) in lines for line in range(first, last + 1))
