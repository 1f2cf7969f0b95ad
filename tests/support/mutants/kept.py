"""Findings about the catalogue in a file, so that a run that was stopped goes on."""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("nvfp4_moe", "mutants")
_WITHOUT = ("mutants.generated.",)  # mutants made by rule have results of their own
OF_KERNELS = (
    "nvfp4_moe.kernels.",
    "mutants.edge_calls.",
    "mutants.edited_copy.",
    "mutants.kernel_calls.",
    "mutants.kernel_mutants.",
    "mutants.syntax.",
)
"""How the names of modules begin, each with a dot behind it, that no run of the reference executes."""


def sources(*, kernels: bool) -> str:
    """Return a digest of what findings depend on: the source that is imported, torch and Triton.

    Args:
        kernels: also of the kernels and their mutants.
    """
    state = hashlib.blake2b(digest_size=8)
    state.update(" ".join(version(name) for name in ("torch", "triton")).encode())
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        left_out = f"{name}.".startswith(_WITHOUT if kernels else (*_WITHOUT, *OF_KERNELS))
        if file is not None and name.split(".")[0] in _PACKAGES and not left_out:
            state.update(f"\n{name}\n".encode() + Path(file).read_bytes())
    return state.hexdigest()


class Kept:
    """Findings by question. A line is added to the file as soon as something is found.

    Its questions end with a digest of the source, which is taken when this is made.

    Args:
        path: the file; None: findings are kept in memory alone.
    """

    def __init__(self, path: Path | None = None):
        self.source, self.source_of_kernels = sources(kernels=False), sources(kernels=True)
        self._path, self._found, self._writes = path, {}, threading.Lock()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                question, finding = json.loads(line)
            except ValueError:  # the last line of a run that was stopped
                continue
            self._found[question] = finding

    def __contains__(self, question: str) -> bool:
        return question in self._found

    def ask(self, question: str, find: Callable[[], Any]) -> Any:
        """Return what is known, or what `find` returns, which is kept; both are as JSON has them."""
        if question not in self._found:
            line = json.dumps([question, find()])
            with self._writes:
                self._found[question] = json.loads(line)[1]
                if self._path is not None:
                    with self._path.open("a", encoding="utf-8") as file:
                        # The line break comes first: the last run may have been stopped within a line.
                        file.write(f"\n{line}")
        return self._found[question]
