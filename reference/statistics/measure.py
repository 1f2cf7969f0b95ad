"""Quantize rows with the reference and count what that does to them.

`counts.py` has what is counted.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from .. import checks
from ..moe.activations import Activations, hidden_values
from ..numerics import e4m3
from ..numerics.subnormals import kept
from ..quantize import Quantized, quantize_block_scales, quantize_global_scale, quantize_per_token
from ..recipe import BLOCK_SIZE, Recipe, check_recipe
from ..weights.scalars import weight_encode_scale
from .counts import BINS, FIRST_BIN, QuantizationStatistics

_LARGEST_THAT_FITS = 464.0  # rounds to 448; the tie with 480, which e4m3 has not
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_ELEMENTS = 1 << 22  # measured at a time


@kept
def quantization_statistics(
    x: torch.Tensor,
    recipe: Recipe | None = None,
    *,
    experts: torch.Tensor | None = None,
    num_experts: int = 1,
    encode_scale: torch.Tensor | None = None,
) -> QuantizationStatistics:
    """Quantize rows with the reference, and count what that does to them.

    Args:
        x: [N, K] bf16 or fp16, K a multiple of 16; fp32 with `encode_scale` only, where it is already
            in the values, as a GEMM's epilogue with static scales leaves them.
        recipe: fast math without 4over6 by default.
        experts: int [N] or [N, S], the experts that a row counts for; others than 0 ... num_experts - 1
            are passed over. Omitted: every row counts for expert 0.
        encode_scale: fp32, one element or one a row, of the global-scale quantizer; None: every row
            has a scale of its own.

    Raises:
        ValueError: a shape or a dtype that does not fit.
    """
    check_recipe(recipe)
    recipe = recipe or Recipe()
    _check(x, experts, num_experts, encode_scale)
    n, k = x.shape
    if experts is None:
        experts = torch.zeros(n, dtype=torch.int64, device=x.device)
    # Experts that are not counted have a place of their own, so that nothing depends on how many.
    counted = (experts >= 0) & (experts < num_experts)
    index = torch.where(counted, experts, num_experts).long()
    index = index[:, None] if index.dim() == 1 else index
    encode = None if encode_scale is None else encode_scale.float().reshape(-1).expand(n)
    sums = QuantizationStatistics.empty(num_experts + 1, x.device)
    step = max(1, _ELEMENTS // k)
    with torch.no_grad():
        for first in range(0, n, step):
            some = slice(first, first + step)
            rows = _measure(x[some], recipe, None if encode is None else encode[some])
            _add_rows(sums, rows, index[some])
    return QuantizationStatistics(
        sums.counts[:-1], sums.histogram[:-1], sums.energies[:-1], sums.extremes[:-1]
    )


@kept
def weight_statistics(w: torch.Tensor, recipe: Recipe | None = None) -> QuantizationStatistics:
    """Quantize the weights [E, M, K] of E experts as `prepare_experts` does, and count.

    Args:
        w: bf16 or fp16, K a multiple of 16; a row is a row of a matrix, [up; gate] share a scale.
        recipe: exact math by default, as there.
    """
    checks.tensor("w", w, checks.HALVES, ("E", "M", "K"))
    if w.shape[2] % BLOCK_SIZE or not w.shape[2]:
        checks.wrong_value("w", w, f"[E, M, K], K a positive multiple of {BLOCK_SIZE}")
    check_recipe(recipe)
    recipe = recipe or Recipe("exact")
    num_experts, rows, _ = w.shape
    encode = weight_encode_scale(w.abs().flatten(1).amax(1), recipe)
    place = torch.arange(num_experts, dtype=torch.int64, device=w.device)
    return quantization_statistics(
        w.flatten(0, 1),
        recipe,
        experts=place[:, None].expand(-1, rows).reshape(-1),
        num_experts=num_experts,
        encode_scale=encode[:, None].expand(-1, rows).reshape(-1),
    )


@dataclass(frozen=True)
class _Rows:
    """The values of each row that `QuantizationStatistics` sums."""

    counts: torch.Tensor  # [N, 10] int64
    maximum: torch.Tensor  # [N] fp32, NaN ignored
    energies: torch.Tensor  # [N, 2] fp64


def _measure(x: torch.Tensor, recipe: Recipe, encode: torch.Tensor | None) -> _Rows:
    q, decode = _quantize(x, recipe, encode)
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    nan, magnitude = blocks.isnan(), blocks.abs()
    top = magnitude.masked_fill(nan, 0).amax(-1)
    scale, four = _kept_scale(q)
    per_block = (
        torch.ones_like(four),
        (blocks == 0).all(-1),
        (top > 0) & ((q.block_scales == 0) | (decode == 0)[:, None]),
        scale > _LARGEST_THAT_FITS,
        four,
        q.block_scales == e4m3.NAN,
    )
    per_element = (nan, magnitude == torch.inf)

    values = x.double()
    decoded = (
        hidden_values(Activations(q.codes, q.block_scales)).double() * decode.double()[:, None]
    )
    maximum = top.float().amax(-1)
    if x.dtype == torch.float32:  # the encode scale is in the values
        values, maximum = values * decode.double()[:, None], maximum * decode
    measured = (values.isfinite() & decoded.isfinite()).all(-1)
    energies = torch.stack((values.square().sum(-1), (values - decoded).square().sum(-1)), -1)
    counts = (
        torch.ones_like(measured).long(),
        *(flags.sum(-1) for flags in per_block),
        *(flags.sum((-2, -1)) for flags in per_element),
        (~measured).long(),
    )
    return _Rows(torch.stack(counts, -1), maximum, torch.where(measured[:, None], energies, 0.0))


def _quantize(
    x: torch.Tensor, recipe: Recipe, encode: torch.Tensor | None
) -> tuple[Quantized, torch.Tensor]:
    """Quantize the rows, and return the steps of the arithmetic and the decode scale [N] of each row."""
    if encode is None:
        # A tensor: of a number the quantizer would make one on the host, and wait for its copy.
        g = torch.full((1,), recipe.base_scale_inv, dtype=torch.float32, device=x.device)
        q = quantize_per_token(x, g, recipe, keep_steps=True)
        assert q.per_token_scale is not None
        return q, q.per_token_scale
    if x.dtype == torch.float32:
        return quantize_block_scales(x, recipe), encode.reciprocal()
    return quantize_global_scale(x, encode, recipe, keep_steps=True), encode.reciprocal()


def _kept_scale(q: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block scales before e4m3, and mark where 4over6 kept 4's candidate: [N, K/16] each."""
    scale = q.steps["block_scale"]
    if "error_of_4" not in q.steps:
        return scale, torch.zeros_like(scale, dtype=torch.bool)
    four = (q.steps["error_of_4"] < q.steps["error_of_6"]) & (q.steps["block_amax"] != 0)
    return torch.where(four, scale * 1.5, scale), four


def _add_rows(sums: QuantizationStatistics, rows: _Rows, index: torch.Tensor) -> None:
    """Add rows [N] to the experts [N, S] that each counts for."""
    each, flat = index.shape[1], index.flatten()

    def repeated(t: torch.Tensor) -> torch.Tensor:
        return t[:, None].expand(-1, each, *t.shape[1:]).flatten(0, 1)

    sums.counts.index_add_(0, flat, repeated(rows.counts))
    sums.energies.index_add_(0, flat, repeated(rows.energies))

    known = (rows.maximum > 0) & rows.maximum.isfinite()
    place = ((rows.maximum.view(torch.int32) >> 21) - FIRST_BIN).clamp(0, BINS - 1).long()
    sums.histogram.view(-1).index_add_(0, flat * BINS + repeated(place), repeated(known.long()))

    maximum = rows.maximum.double()
    signal, noise = rows.energies.unbind(-1)
    extremes = torch.stack((maximum, -maximum, noise / signal), -1)
    usable = torch.stack((known, known, signal > 0), -1)
    extremes = repeated(torch.where(usable, extremes, -torch.inf))
    sums.extremes.scatter_reduce_(0, flat[:, None].expand(-1, 3), extremes, "amax")


def _check(
    x: torch.Tensor,
    experts: torch.Tensor | None,
    num_experts: int,
    encode_scale: torch.Tensor | None,
) -> None:
    dtypes = checks.HALVES if encode_scale is None else checks.FLOATS
    checks.tensor("x", x, dtypes, ("N", "K"))
    if x.shape[1] % BLOCK_SIZE or not x.shape[1]:
        checks.wrong_value("x", x, f"[N, K], K a positive multiple of {BLOCK_SIZE}")
    checks.integer("num_experts", num_experts, 1)
    if encode_scale is not None:
        checks.tensor("encode_scale", encode_scale, (torch.float32,), like=("x", x))
        if encode_scale.numel() not in (1, x.shape[0]):
            checks.wrong_value("encode_scale", encode_scale, f"of 1 or {x.shape[0]} elements")
    if experts is not None:
        checks.tensor("experts", experts, _INTEGERS, like=("x", x))
        if experts.dim() not in (1, 2) or len(experts) != len(x):
            checks.wrong_value("experts", experts, f"[{len(x)}] or [{len(x)}, S]")
