"""The golden outputs as cases: (recipe or kind of kernel, input, expected arrays)."""

# SPDX-License-Identifier: Apache-2.0
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.recipe import Recipe, SfLayout

OUTPUTS = {False: 3741, True: 140}
"""How many output arrays the two files hold; `edge` is the key."""

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


def cases(edge: bool) -> Iterator[Case]:
    """Every kernel run of a golden file; each of its arrays is in one case's `expected`, or an input."""
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
