"""Results of the mutants made by rule, in a file of the repository.

A line for each function: its file, its name, a digest, and for each device a letter for each mutant in
order. The digest is of the function without its docstring, and of the names of its mutants: a function
that changes, or a rule, loses what was known of it; a file that is renamed loses nothing.
"""

# SPDX-License-Identifier: Apache-2.0
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import harmless
from .rules import Generated

KEPT = Path(__file__).with_name("results.txt")
STATUSES = {"k": "killed", "t": "timed out", "s": "survived"}
_NOT_TRIED = "."
_BEST_FIRST = "".join(STATUSES) + _NOT_TRIED
_HEAD = """\
# Mutants made by rule, of each function: file, name, digest, and for each device a letter for each
# mutant: k killed, t timed out, s survived, . not tried. `make mutants` reads and writes this.
"""


class Results:
    """The results of some mutants, from a file and since; any number of processes may write the file.

    Args:
        mutants: all mutants; what the file has of others is of functions that have changed.
    """

    def __init__(self, path: Path, mutants: Sequence[Generated]):
        functions: dict[tuple[str, str], list[Generated]] = {}
        for mutant in mutants:
            functions.setdefault((mutant.file, mutant.function), []).append(mutant)
        self.path = path
        self._functions = {_digest(some): some for some in functions.values()}
        self._place = {m: (d, i) for d, some in self._functions.items() for i, m in enumerate(some)}
        self._letters: dict[str, dict[str, str]] = {digest: {} for digest in self._functions}
        self.merge(path)

    def merge(self, path: Path) -> None:
        """Take in what a file knows, from whatever machine; of two results the better one counts."""
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            if line.startswith("#"):
                continue
            _, _, digest, *columns = line.split()
            for device, letters in (column.split("=") for column in columns):
                if digest in self._functions:
                    self._take(digest, device, letters)

    def add(self, mutant: Generated, device: str, status: str) -> None:
        digest, index = self._place[mutant]
        letter = next(letter for letter, name in STATUSES.items() if name == status)
        self._take(digest, device, _NOT_TRIED * index + letter)

    def _take(self, digest: str, device: str, letters: str) -> None:
        count, of = len(self._functions[digest]), self._letters[digest]
        both = (some.ljust(count, _NOT_TRIED) for some in (of.get(device, ""), letters))
        of[device] = "".join(min(pair, key=_BEST_FIRST.index) for pair in zip(*both, strict=True))

    def of(self, mutant: Generated) -> dict[str, str]:
        """Its status on each device on which it has been tried."""
        digest, index = self._place[mutant]
        found = {device: letters[index] for device, letters in self._letters[digest].items()}
        return {d: STATUSES[letter] for d, letter in found.items() if letter != _NOT_TRIED}

    def status(self, mutant: Generated) -> str:
        """The best that is known: killed, timed out, harmless, open, or not tried."""
        found = self.of(mutant).values()
        for status in ("killed", "timed out"):
            if status in found:
                return status
        if harmless.reason(mutant.key):
            return "harmless"
        return "open" if found else "not tried"

    def write(self) -> None:
        """The whole file, with what other processes have written meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            self.merge(self.path)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(_HEAD + "".join(f"{line}\n" for line in self._lines()), "utf-8")
            part.replace(self.path)

    def _lines(self) -> Iterator[str]:
        for digest, some in self._functions.items():
            if of := self._letters[digest]:
                columns = (f"{device}={letters}" for device, letters in sorted(of.items()))
                yield " ".join([some[0].file, some[0].function.replace(" ", ""), digest, *columns])


def _digest(of_function: Sequence[Generated]) -> str:
    state = hashlib.blake2b(of_function[0].unchanged.encode(), digest_size=6)
    for mutant in of_function:
        state.update(f"\n{mutant.key}".encode())
    return state.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes results into the folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
