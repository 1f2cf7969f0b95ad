"""The arrays that FlashInfer's kernels gave, and the cases that they belong to.

`cases.json.xz` lists every case by kind. A folder of arrays may lack cases, and may be of another seed:
arrays of other inputs are compared by the same code.
"""

# SPDX-License-Identifier: Apache-2.0
import io
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from paths import ROOT

from nvfp4_moe.reference.recipe import Recipe, SfLayout

from .draw import Array
from .inputs import Case

VERSION = "0.7.2.post1"
FOLDER = ROOT / "tests" / "golden" / f"flashinfer-{VERSION}"
SEED = 20270107

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
LAYOUTS = {int(layout): layout for layout in SfLayout}


@dataclass(frozen=True)
class Golden:
    """Arrays by name, and the seed of their inputs."""

    arrays: dict[str, Array]
    seed: int
    listed: dict[str, list[Case]]
    part: tuple[int, int] = (0, 1)
    """(which, of how many) successive parts of each kind is taken."""

    def cases(self, kind: str, key: str, every: int = 1) -> Iterator[Case]:
        """Every n-th case of a kind that has arrays; `key` makes an array's name of a case's."""
        there = [c for c in self.listed[kind] if key.format(c["name"]) in self.arrays][::every]
        which, parts = self.part
        # Neighbours need the same kernels, which one process then compiles.
        yield from there[which * len(there) // parts : (which + 1) * len(there) // parts]


@dataclass(frozen=True)
class Outcome:
    """One case compared: `differing` of `elements` are not what the contract allows."""

    group: str
    name: str
    elements: int
    differing: int
    first: str = ""

    def __str__(self) -> str:
        return f"{self.group}, {self.name}: {self.differing} of {self.elements} differ{self.first}"


def arrays_in(folder: Path) -> list[Path]:
    """Return the .npz and .npz.xz of a folder."""
    return sorted(folder.glob("*.npz*"))


def load(folder: Path = FOLDER, seed: int = SEED) -> Golden:
    """Read every .npz and .npz.xz of a folder; the list of cases is that of the repository.

    Raises:
        FileNotFoundError: the folder has no arrays.
    """
    arrays: dict[str, Array] = {}
    for path in arrays_in(folder):
        raw = path.read_bytes()
        with np.load(io.BytesIO(lzma.decompress(raw) if path.suffix == ".xz" else raw)) as file:
            arrays |= dict(file)
    if not arrays:
        raise FileNotFoundError(f"{folder} has no .npz and no .npz.xz")
    listed = json.loads(lzma.decompress((FOLDER / "cases.json.xz").read_bytes()))
    return Golden(arrays, seed, listed)


def recipe_of(c: Case, build: int = 0) -> Recipe:
    """The recipe of a case; `build` is the bit of the CuTe-DSL build."""
    return Recipe.from_code(c["code"] | c["exact"] << 5 | build)


def tensor(bits: Array, dtype: str) -> torch.Tensor:
    """The bits of a matrix in their dtype."""
    signed = np.ascontiguousarray(bits).view(np.uint8 if bits.itemsize == 1 else np.int16)
    return torch.from_numpy(signed.copy()).view(DTYPES[dtype])


def compared(group: str, name: str, got: torch.Tensor, want: Array) -> Outcome:
    """Bit for bit; NaN equals any NaN of floats."""
    actual = got.detach().cpu()
    if actual.is_floating_point():
        floats = torch.from_numpy(want.view(np.int16 if want.itemsize == 2 else np.int32).copy())
        expected = floats.view(actual.dtype).reshape(actual.shape)
        both_nan = actual.isnan() & expected.isnan()
        integer = torch.int16 if actual.element_size() == 2 else torch.int32
        wrong = (actual.view(integer) != expected.view(integer)) & ~both_nan
    else:
        expected = torch.from_numpy(want.copy()).reshape(actual.shape)
        wrong = actual != expected
    first = ""
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        first = f", first at {place}: {actual[place].item()}, expected {expected[place].item()}"
    return Outcome(group, name, wrong.numel(), int(wrong.sum()), first)
