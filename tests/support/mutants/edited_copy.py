"""Edit the source of a copy of nvfp4_moe, and run its kernels in the interpreter."""

# SPDX-License-Identifier: Apache-2.0
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nvfp4_moe
from nvfp4_moe.differential import workers
from nvfp4_moe.kernels import backends

from .calls import Call
from .kernel_calls import prepared
from .syntax import Edit, Spot

_PACKAGE = Path(nvfp4_moe.__file__).resolve().parent
_MUTANTS = Path(__file__).resolve().parent
KERNELS = Path(backends.__file__).resolve().parent
_UNUSED = shutil.ignore_patterns("__pycache__", "data")


@dataclass(frozen=True)
class KernelMutant:
    """An edit of `kernels/`, and the call of `kernel_calls` that is to show it."""

    name: str
    call: str
    edit: Edit

    @property
    def file(self) -> str:
        """The module that has the place, such as "moe/routing.py"."""
        return self.place(KERNELS)[0].relative_to(KERNELS).as_posix()

    def place(self, kernels: Path) -> tuple[Path, Spot]:
        """Find the place of the edit in a folder of kernels.

        Raises:
            ValueError: nowhere, or in more than one place.
        """
        try:
            return self.edit.place(kernels)
        except ValueError as error:
            raise ValueError(f"mutant {self.name!r}: {error}") from None

    def apply(self, kernels: Path) -> None:
        """Edit the copy in a folder."""
        path = self.place(kernels)[0]
        path.write_text(self.edit.applied(path.read_text("utf-8")), "utf-8")


def copy_package(root: Path) -> Path:
    """Copy nvfp4_moe and this package side by side into a folder; the folder of the copied kernels.

    The links of a checkout become folders. A process that starts in `root` imports both copies.
    """
    for package in (_PACKAGE, _MUTANTS):
        shutil.copytree(package, root / package.name, ignore=_UNUSED)
    return root / _PACKAGE.name / "kernels"


Tried = tuple[KernelMutant | None, str]
"""A mutant, or None for the kernels as they are; and the name of a call."""


def answer(mutant: KernelMutant | None, call: str) -> Any:
    """Return the result of the call in the interpreter; without a mutant, of the kernels as they are.

    Raises:
        ValueError: the mutant's edit does not fit.
        RuntimeError: the call did not come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels = copy_package(Path(folder))
        if mutant is not None:
            mutant.apply(kernels)
        try:
            return workers.call_in_one(
                _answer,
                [(prepared(call)[0],)],
                Path(folder),
                TRITON_INTERPRET="1",
                OMP_NUM_THREADS="1",
            )[0]
        except RuntimeError as error:
            name = "no mutant" if mutant is None else f"mutant {mutant.name!r}"
            raise RuntimeError(f"{name}, {call}: {error}") from None


def _answer(call: Call) -> Any:
    # Memory that nobody writes is full of NaN, so that a row left out is seen every time.
    torch.set_deterministic_debug_mode("warn")
    return call.answer()
