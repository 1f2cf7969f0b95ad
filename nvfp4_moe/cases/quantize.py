"""The input tensors of `nvfp4-moe diff`, and the cases in which each is quantized."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from safetensors import safe_open

from .. import files, host
from ..reference.quantize import Quantized
from ..reference.recipe import BLOCK_SIZE, Recipe, SfLayout, all_recipes
from . import inputs

Mode = Literal["per-token", "global-scale", "row scales", "fp32 per-token"]
Group = Literal["golden", "synthetic", "activations", "file"]

RECIPES = {
    "all": lambda r: True,
    "plain": lambda r: r.four_over_six is None,
    "4over6": lambda r: r.four_over_six is not None,
    "fast": lambda r: r.math == "fast",
    "exact": lambda r: r.math == "exact",
}
"""Choices of `--recipes`, as predicates."""

SHAPES = ((33, 80), (5, 272))
"""Shapes of synthetic inputs: a row more than two programs of 16, columns that fill no power of 2."""

PIECE = 1 << 24
"""Larger tensors are compared in runs of rows of about this many elements, to bound memory."""


@dataclass(frozen=True)
class Case:
    """One way to quantize a tensor; `global_scale` is the fp32 encode scale of that mode."""

    mode: Mode
    recipe: Recipe
    layout: SfLayout
    global_scale: float | None = None

    @property
    def per_token(self) -> bool:
        """True if the quantizer finds the scales of the rows, and returns them."""
        return self.mode in ("per-token", "fp32 per-token")

    def scale(self, x: torch.Tensor) -> float | torch.Tensor:
        """Return a quantizer's scale for x: a base or encode scale, or fp32 [M], one for each row."""
        if self.per_token:
            return self.recipe.base_scale_inv
        if self.mode == "row scales":
            return row_scales(x, self.recipe)
        assert self.global_scale is not None
        return self.global_scale


@dataclass(frozen=True)
class Input:
    """A tensor [M, K] and its cases.

    Args:
        name: what a person finds it by.
        first_row: the row of the named tensor that `x` starts with.
        golden: outputs of FlashInfer's own kernels, for the cases that have them.
        interpreted: whether it is worth the interpreter's time.
    """

    group: Group
    name: str
    x: torch.Tensor
    cases: list[Case]
    first_row: int = 0
    golden: dict[Case, Quantized] = field(default_factory=dict)
    interpreted: bool = True


def global_scale(x: torch.Tensor, recipe: Recipe) -> float:
    """Encode scale e4m3_max * 6 / amax in fp32, amax over the finite elements; 1 if none is usable."""
    return _encode_scales(x.flatten()[None], recipe).item()


def row_scales(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the scale of each row: fp32 [M] on the device of x [M, K]."""
    return _encode_scales(x, recipe).to(x.device)


def _encode_scales(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    if x.dtype == torch.float8_e4m3fn:
        x = x.float()
    magnitude = x.abs()
    amax = magnitude.where(magnitude.isfinite(), 0).amax(1).float()
    scale = host.fp32(recipe.e4m3_max * 6.0) / amax.cpu()
    return scale.where(scale.isfinite(), 1.0)


def cases(x: torch.Tensor, recipes: list[Recipe], every_layout: bool) -> list[Case]:
    """Every mode and recipe that tensors of x's type have.

    Plain recipes take all three layouts. Those of 4over6 do with `every_layout`, else one each in
    turn: the layout is no part of the arithmetic. So do scales for each row, which the CUDA build
    alone takes.
    """
    result = []
    for i, recipe in enumerate(recipes):
        plain = recipe.four_over_six is None
        in_turn = list(SfLayout) if every_layout else [SfLayout(i % len(SfLayout))]
        layouts = list(SfLayout) if plain else in_turn
        if x.dtype == torch.float32:
            if recipe == Recipe():
                result += [Case("fp32 per-token", recipe, layout) for layout in layouts]
            continue
        if x.dtype != torch.float8_e4m3fn:
            result += [Case("per-token", recipe, layout) for layout in layouts]
        elif not plain:
            continue
        scale = global_scale(x, recipe)
        result += [Case("global-scale", recipe, layout, scale) for layout in layouts]
        if recipe.build == "cuda":
            result += [Case("row scales", recipe, layout) for layout in in_turn]
    return result


def synthetic(
    kinds: Iterable[str], seed: int, rows: int | None, recipes: list[Recipe], every_layout: bool
) -> Iterator[Input]:
    """The seeded kinds in both shapes, bf16, fp16 and e4m3; fp32 too, but for the bit patterns."""
    for kind in kinds:
        for m, k in SHAPES:
            for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32):
                if dtype == torch.float32 and kind == "bits":
                    continue
                x = inputs.synthetic(kind, m, k, dtype, seed)[:rows]
                name = f"{kind} {_short(dtype)} {m}x{k} seed {seed}"
                if chosen := cases(x, recipes, every_layout):
                    yield Input("synthetic", name, x, chosen)


def activations(
    rows: int | None, recipes: list[Recipe], every_layout: bool
) -> Iterator[tuple[str, torch.Tensor, list[Input]]]:
    """(name, whole tensor, what to compare of it) for each tensor that ships with the package."""
    for name, x in sorted(inputs.activations().items()):
        yield name, x, _pieces("activations", name, x, rows, recipes, every_layout)


def from_file(
    path: str,
    rows: int | None,
    recipes: list[Recipe],
    every_layout: bool,
    skipped: dict[str, str],
) -> Iterator[tuple[str, torch.Tensor, list[Input]]]:
    """Like `activations`, for a safetensors file; `skipped` collects names and reasons.

    The file is one that `check_file` let pass.
    """
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            if reason := _unfit(part.get_shape(), part.get_dtype()):
                skipped[name] = reason
                continue
            with host.READING:
                x = part[:rows]
            pieces = _pieces("file", name, x, rows, recipes, every_layout)
            if pieces:
                yield name, x, pieces
            else:
                skipped[name] = "fp32 has the recipe fast-cuda only, which --recipes leaves out"


def check_file(path: str) -> None:
    """CommandError, before any work, where `from_file` could not read the file."""
    files.check_safetensors("--input", path)


def golden(recipes: list[Recipe]) -> Iterator[Input]:
    """FlashInfer's own outputs, each array of which is compared once."""
    for edge in (False, True):
        arrays = inputs.golden(edge)
        names: dict[str, list[str]] = {}
        for key in arrays:
            names.setdefault("/".join(key.split("/")[:3]), []).append(key)
        for name in sorted(names):
            yield from _golden(name, {k[len(name) + 1 :]: arrays[k] for k in names[name]}, recipes)


def _golden(name: str, arrays: dict[str, torch.Tensor], recipes: list[Recipe]) -> Iterator[Input]:
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
    interpreted = name.endswith(("/7x80", "/84x32"))
    outputs: dict[Case, Quantized] = {}
    for key in sorted(arrays):
        *path, last = key.split("/")
        if last not in ("sf", "sf_128x4", "sf_8x4") or "fp32in" in path:
            continue
        prefix = "/".join(path)
        layout = SfLayout["layout_" + (last[3:] or "linear")]
        per_token = path[0].startswith("exact")
        exact = path[0 if per_token else 1] == "exact1"
        code = int(path[1].removeprefix("code")) if per_token else 0
        case = Case(
            "per-token" if per_token else "global-scale",
            Recipe.from_code(code | exact << 5),
            layout,
            None if per_token else arrays[f"{prefix}/gs"].item(),
        )
        if case.recipe in recipes:
            scale = arrays.get(f"{prefix}/scale")
            outputs[case] = Quantized(arrays[f"{prefix}/q"], arrays[key], scale)
    x = arrays["x"].view(dtype)
    if outputs:
        yield Input("golden", name, x, list(outputs), golden=outputs, interpreted=interpreted)
    if "fp32in/x" in arrays and Recipe() in recipes:
        case = Case("fp32 per-token", Recipe(), SfLayout.layout_linear)
        q = Quantized(arrays["fp32in/q"], arrays["fp32in/sf"], arrays["fp32in/scale"])
        name = f"{name}/fp32in"
        yield Input("golden", name, arrays["fp32in/x"], [case], 0, {case: q}, interpreted)


def _pieces(
    group: Group,
    name: str,
    x: torch.Tensor,
    rows: int | None,
    recipes: list[Recipe],
    every_layout: bool,
) -> list[Input]:
    """The first `rows` rows in runs of about PIECE elements, under one global scale."""
    x = x[:rows]
    chosen = cases(x, recipes, every_layout)
    step = max(1, PIECE // (128 * x.shape[1])) * 128
    return [
        Input(group, name, x[start : start + step], chosen, start)
        for start in range(0, x.shape[0] if chosen else 0, step)
    ]


def _unfit(shape: list[int], dtype: str) -> str | None:
    """Why a tensor of a file cannot be quantized, or None."""
    if dtype not in ("BF16", "F16", "F32"):
        return f"dtype is {dtype}; it must be BF16, F16 or F32"
    if len(shape) != 2:
        return f"shape is {shape}; it must have 2 dimensions"
    if 0 in shape:
        return f"shape is {shape}: no elements"
    if shape[1] % BLOCK_SIZE:
        return f"K is {shape[1]}; it must be a multiple of {BLOCK_SIZE}"
    return None


def choose(name: str) -> list[Recipe]:
    """The recipes of one of the RECIPES."""
    return [r for r in all_recipes() if RECIPES[name](r)]


def _short(dtype: torch.dtype) -> str:
    return {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float8_e4m3fn: "e4m3",
        torch.float32: "fp32",
    }[dtype]
