"""The one error of a checkpoint that cannot be used."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from pathlib import Path

_SHOWN = 20


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint, found before anything was built of it.

    `problems` has them all; the message is one line for one, else it shows the first 20 and how many
    there are.
    """

    def __init__(self, where: Path | str, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [f"{where}: {problems[0]}" if count == 1 else f"{where}: {count} problems"]
        lines += [f"  {problem}" for problem in self.problems[:_SHOWN] if count > 1]
        if count > _SHOWN:
            lines.append(f"  ... and {count - _SHOWN} more")
        super().__init__("\n".join(lines))
