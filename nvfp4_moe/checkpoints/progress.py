"""Progress of long reading or writing: a callback."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what was done last)."""


def silent(done: int, total: int, what: str) -> None:
    """The callback that shows nothing."""
