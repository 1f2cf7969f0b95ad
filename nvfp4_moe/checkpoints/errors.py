"""The one error of a checkpoint that cannot be used."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from pathlib import Path

_SHOWN = 20


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint, found before anything was built of it.

    `problems` has them all; the message shows the first 20, a line each, and how many there are.
    """

    def __init__(self, where: Path | str, problems: Sequence[str]):
        self.where, self.problems = where, tuple(problems)
        count = len(self.problems)
        lines = [f"{where}: {count} problem{'s' if count != 1 else ''}"]
        lines += [f"  {problem}" for problem in self.problems[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"  ... and {count - _SHOWN} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[Path | str, tuple[str, ...]]]:
        return type(self), (self.where, self.problems)

    def for_a_terminal(self) -> str:
        """Return the message: one line for one problem."""
        return f"{self.where}: {self.problems[0]}" if len(self.problems) == 1 else str(self)
