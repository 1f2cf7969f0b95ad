"""The quantizer with a scale for each token, over matrices and recipes.

A call moves the input, the codes, the block scales and the scales of the tokens. Every backend's bits
are first compared with the reference's on a few rows.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..kernels.quantize.api import BACKENDS, explain, nvfp4_quantize
from ..reference.recipe import NVFP44Over6Config, SfLayout
from .case import Case, NotHere, Operation, Prepared, Selection, WrongResult

COPY = "copy_"
"""torch's copy of the input: the baseline."""
_COLUMNS = (4096, 7168)
_RECIPES = ("fast", "exact", "fast, 4over6")
_SCALE = 1 / (448 * 6)
_CHECKED = 64
"""Rows that are compared with the reference."""


def _shape(columns: int, recipe: str) -> str:
    return f"K={columns} {recipe}"


SHAPES = {_shape(columns, recipe): (columns, recipe) for columns in _COLUMNS for recipe in _RECIPES}


def prepare(case: Case, device: torch.device) -> Prepared:
    """Make a call for random bf16 rows."""
    columns, recipe = SHAPES[case.shape]
    x = torch.randn(case.tokens, columns, dtype=torch.float32, device=device).bfloat16()
    if case.backend == COPY:
        y = torch.empty_like(x)
        return Prepared(lambda: y.copy_(x), 0, 2 * x.nbytes)
    options: dict[str, Any] = {
        "per_token_activation": True,
        "fast_math": recipe != "exact",
        "nvfp4_4over6": NVFP44Over6Config() if "4over6" in recipe else None,
        "build": "cute-dsl" if case.backend.endswith("cute-dsl") else "cuda",
    }
    explanation = explain(x, _SCALE, SfLayout.layout_linear, **options)
    if (reason := explanation.reason(case.backend)) is not None:
        raise NotHere(reason)

    def call(rows: torch.Tensor = x, backend: str = case.backend) -> tuple[torch.Tensor, ...]:
        return nvfp4_quantize(rows, _SCALE, SfLayout.layout_linear, backend=backend, **options)

    if case.backend != "reference":
        some = x[:_CHECKED]
        for got, want in zip(call(some), call(some, "reference"), strict=True):
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                raise WrongResult(f"bits differ from the reference's: {case.id}")
    moved = x.numel() * (2 + 1 / 2 + 1 / 16) + 4 * case.tokens
    return Prepared(call, 0, moved, capturable=case.backend != "reference")


_ALL = tuple(SHAPES)
QUANTIZE = Operation(
    "quantize",
    "rows",
    Selection(_ALL, (1, 32, 128, 1024, 8192), (*BACKENDS, COPY)),
    {
        "cpu": Selection((_shape(4096, "fast"), _shape(4096, "exact")), (1, 128), ("reference", COPY)),
        "cuda": Selection(_ALL, (1, 128, 8192), (*(b for b in BACKENDS if b != "reference"), COPY)),
    },
    COPY,
    prepare,
)  # fmt: skip
