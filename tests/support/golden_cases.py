"""The golden outputs as cases: (recipe or kind of kernel, input, expected arrays)."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.recipe import Recipe, SfLayout, all_recipes

OUTPUTS = {False: 3741, True: 140}
"""The number of output arrays in each of the two files; `edge` is the key."""
SMALL_OUTPUTS = 372
"""The number of those that belong to `small` cases of the file that is not `edge`."""
RECIPES = [r for r in all_recipes() if r.build == "cuda"]
"""Every recipe of the golden files."""

LAYOUTS = {
    "sf": SfLayout.layout_linear,
    "sf_128x4": SfLayout.layout_128x4,
    "sf_8x4": SfLayout.layout_8x4,
}


@dataclass(frozen=True)
class Case:
    name: str
    x: torch.Tensor
    recipe: Recipe
    global_scale: torch.Tensor | None  # None: per token
    expected: dict[str, torch.Tensor]  # q, scale, and sf in one or more layouts

    @property
    def layouts(self) -> list[tuple[str, SfLayout]]:
        return [(name, layout) for name, layout in LAYOUTS.items() if name in self.expected]


def small(case: Case) -> bool:
    """Return True for the inputs that the interpreter takes: random bits, at most 64 columns."""
    return "bits" in case.name and case.x.shape[1] <= 64


@functools.cache
def cases(edge: bool) -> tuple[Case, ...]:
    """Return every kernel run of a golden file, whose arrays are each in one `expected`, or an input."""
    return tuple(_read(edge))


def _read(edge: bool) -> Iterator[Case]:
    groups: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in inputs.golden(edge).items():
        group, name = key.rsplit("/", 1)
        groups[group][name] = value
    for group, arrays in groups.items():
        dtype, kind, shape, *rest = group.split("/")
        if not rest:
            continue  # the input itself
        if rest == ["fp32in"]:
            x = arrays.pop("x")
        else:
            bits = groups[f"{dtype}/{kind}/{shape}"]["x"]
            x = bits.view(torch.bfloat16 if dtype == "bf16" else torch.float16)
        exact = "exact1" in rest
        code = next((int(part[4:]) for part in rest if part.startswith("code")), 0)
        recipe = Recipe.from_code(code | exact << 5)
        yield Case(group, x, recipe, arrays.pop("gs", None), arrays)
