"""Mistakes of the fake FlashInfer's kernels, each of a kind that upstream kernels have had, or could."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from mutants.quantizers import QUANTIZERS, as_requantize, half_up
from mutants.stages import in_bf16, other_finalize, sigmoid_of_up
from mutants.tensors import next_row, of_one

from nvfp4_moe.reference import quantize
from nvfp4_moe.reference.activation import activate
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.moe import fp8
from nvfp4_moe.reference.moe.layer import read_back
from nvfp4_moe.reference.moe.routing import Routing
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.quantize import (
    Quantized,
    quantize_global_scale,
    quantize_per_token,
)
from nvfp4_moe.reference.recipe import BLOCK_SIZE, SfLayout

from .baseline_layers import NAMES as BASELINE_NAMES
from .behaviour import Behaviour, Given, Matrix, quantized, routed
from .layers import fused_finalize

Tensor = torch.Tensor
QUANTIZERS_OF = ("flashinfer:cuda", "flashinfer:cute-dsl", "flashinfer:cake")
TRTLLM, CUTE_DSL, CUTLASS = "flashinfer:trtllm", "flashinfer:cute-dsl", "flashinfer:cutlass"
BASELINES = BF16, FP8_TENSOR, FP8_BLOCK, MXFP8 = tuple(BASELINE_NAMES.values())


@dataclass(frozen=True)
class Fault:
    of: str
    """A "quantizer", a "layer" or a "baseline": flashinfer:cute-dsl names one of each."""
    backends: tuple[str, ...]
    """That have it."""
    seen: str
    """The place where it must show."""
    behaviour: Behaviour
    tactics: tuple[str, ...] = ()
    """That alone have it, by name; empty: all of them, the default too."""


def _quantizer(
    seen: str, f: Callable[[Matrix], Quantized], backends: tuple[str, ...] = QUANTIZERS_OF
) -> Fault:
    return Fault("quantizer", backends, seen, Behaviour(quantize=f))


def _layer(
    backends: tuple[str, ...], seen: str, f: Callable[[Given], Given], *tactics: str
) -> Fault:
    """f changes the arguments of the reference."""
    apply = Behaviour(
        layer=lambda given, tactic: f(given) if not tactics or tactic in tactics else given
    )
    return Fault("layer", backends, seen, apply, tactics)


def _baseline(
    backends: tuple[str, ...], seen: str, f: Callable[[Given], Given], *tactics: str
) -> Fault:
    """f changes the arguments of the baselines' reference."""

    def baseline(given: Given, tactic: str) -> Given:
        here = BASELINE_NAMES[given["experts"].format] in backends
        return f(given) if here and (not tactics or tactic in tactics) else given

    return Fault("baseline", backends, seen, Behaviour(baseline=baseline), tactics)


def _stages(**changes: Any) -> Callable[[Given], Given]:
    return lambda given: given | {"stages": replace(given["stages"], **changes)}


def _ties_away(m: Matrix) -> Quantized:
    with mock.patch.object(e2m1, "encode", half_up):
        return quantized(m)


def _next_rows_scales(m: Matrix) -> Quantized:
    if m.layout != SfLayout.layout_128x4:
        return quantized(m)
    q = quantized(replace(m, layout=SfLayout.layout_linear))
    return replace(q, block_scales=from_linear(next_row(q.block_scales), m.layout))


def _padding_not_written(m: Matrix) -> Quantized:
    q = quantized(m)
    ones = torch.ones(m.x.shape[0], m.x.shape[1] // BLOCK_SIZE, dtype=torch.bool)
    inside = from_linear(ones, m.layout)
    return replace(q, block_scales=q.block_scales.masked_fill(~inside, 0x38))


def _always_fast(m: Matrix) -> Quantized:
    return quantized(replace(m, recipe=replace(m.recipe, math="fast")))


class _Negating:
    """Arithmetic whose sums, which 4over6 compares, are negative."""

    def __init__(self, arithmetic: Any) -> None:
        self._arithmetic = arithmetic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arithmetic, name)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return -self._arithmetic.add(a.abs(), b)


def _larger_error(m: Matrix) -> Quantized:
    right = quantize._four_over_six_blocks

    def wrong(*given: Any) -> Quantized:
        *others, arithmetic, by_halves = given
        return right(*others, _Negating(arithmetic), by_halves)

    with mock.patch.object(quantize, "_four_over_six_blocks", wrong):
        return quantized(m)


def _an_ulp_more(m: Matrix) -> Quantized:
    q = quantized(m)
    if q.per_token_scale is None:
        return q
    more = of_one(lambda t: torch.nextafter(t, t + 1))
    return replace(q, per_token_scale=more(q.per_token_scale))


def _last_tile_dropped(given: Given) -> Given:
    """The rows of one expert that fill no tile of 192."""
    gemm2, dropped = given["stages"].gemm2, False

    def gemm(x: Tensor, w: Tensor, accumulate: Any) -> Tensor:
        nonlocal dropped
        out = gemm2(x, w, accumulate)
        if not dropped:
            out[(x.shape[0] - 1) // 192 * 192 :] = 0
        dropped = True
        return out

    return _stages(gemm2=gemm)(given)


def _fails(given: Given) -> Given:
    raise RuntimeError("Error occurred when running GEMM!")


def _fp32_intermediate(given: Given) -> Given:
    def requantize(y: Tensor, _: Any, recipe: Any, steps: Any) -> Any:
        q = quantize_per_token(y.flatten(0, 1), recipe.base_scale_inv, recipe)
        return read_back(q, y.shape[:2], steps)

    return _stages(round_intermediate=torch.Tensor.float, requantize=requantize)(given)


def _wrong_token_scale(given: Given) -> Given:
    a = given["activations"]
    return given | {"activations": replace(a, per_token_scale=next_row(a.per_token_scale))}


def _gate_for_up(given: Given) -> Given:
    gated = given["experts"].activation.gated
    return _stages(activate=sigmoid_of_up)(given) if gated else given


def _plain_intermediate(given: Given) -> Given:
    return given | {"recipe": replace(given["recipe"], four_over_six=None)}


def _first_gemm_in_fp32(given: Given) -> Given:
    def requantize(y: Tensor, _: Any, recipe: Any, steps: Any) -> Any:
        encode = given["experts"].intermediate_scale
        q = quantize_global_scale(y.flatten(0, 1).bfloat16(), encode, recipe)
        return read_back(q, y.shape[:2], steps)

    def of_raw(raw: Tensor, experts: Any, e: int) -> Tensor:
        return activate(raw * experts.output1_scale_gate_scalar[e], experts.activation)

    return _stages(activate=of_raw, requantize=requantize)(given | {"variant": "cuda"})


def _halves_exchanged(given: Given) -> Given:
    e = given["experts"]

    def exchanged(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() == 1 else torch.cat(t.chunk(2, 1)[::-1], 1)

    changed = replace(e, w13=exchanged(e.w13), w13_scale=exchanged(e.w13_scale))
    return given | {"experts": changed}


def _scale_rounded_down(x: Tensor) -> fp8.Scaled:
    """As FlashInfer's trace template does: 448 is exceeded and saturates."""
    q = fp8.quantize_mxfp8(x)
    byte = q.scale - (q.scale > 1).to(torch.uint8) * (q.scale < 255)
    values = x.float().unflatten(-1, (-1, fp8.MX_BLOCK)) / fp8.mx_scale(byte).float()[..., None]
    return fp8.Scaled(e4m3.encode(values).view(torch.float8_e4m3fn).flatten(-2), byte)


def _scale_of_the_next_block(given: Given) -> Given:
    e = given["experts"]
    return given | {"experts": replace(e, w13_scale=e.w13_scale.roll(1, -1))}


def _scale_of_the_next_token(given: Given) -> Given:
    a = given["activations"]
    tokens = 0 if a.scale.dtype == torch.uint8 else 1
    return given | {"activations": replace(a, scale=a.scale.roll(1, tokens))}


def _scale_of_the_next_expert(given: Given) -> Given:
    e = given["experts"]
    return given | {"experts": replace(e, w2_scale=e.w2_scale.roll(1, 0))}


def _last_expert_dropped(given: Given) -> Given:
    e = given["experts"]
    return given | {
        "experts": replace(
            e,
            **{
                name: None if getattr(e, name) is None else getattr(e, name)[:-1]
                for name in ("w13", "w2", "w13_scale", "w2_scale")
            },
        )
    }


def _ties_to_the_larger(
    logits: Tensor, routing: Routing, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    ids, weights = routed(logits.flip(1), routing, None if bias is None else bias.flip(0))
    return logits.shape[1] - 1 - ids, weights


def _bias_in_the_weights(
    logits: Tensor, routing: Routing, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    ids, weights = routed(logits, routing, bias)
    if bias is None:
        return ids, weights
    scores = (torch.sigmoid(logits.float()) + bias).gather(1, ids.long())
    return ids, (scores * routing.scale / scores.sum(1, keepdim=True)).bfloat16()


def _last_bit(output: Tensor, calls: int) -> Tensor:
    """Every second call has one bit of its largest element otherwise."""
    if calls % 2 == 0:
        return output
    flipped = output.clone()
    bits = flipped.view(torch.int16).view(-1)
    bits[int(output.abs().argmax())] ^= 1
    return flipped


FAULTS: dict[str, Fault] = {
    "ties of a code round away from zero": _quantizer("codes of inputs on the grid", _ties_away),
    "block scale of the next row in 128x4": _quantizer(
        "block scales in layout_128x4, no other layout", _next_rows_scales
    ),
    "padding not zeroed": _quantizer(
        "block scales of a shape that its layout pads", _padding_not_written
    ),
    "exact math ignored": _quantizer(
        "any output under FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1", _always_fast, QUANTIZERS_OF[:2]
    ),
    "4over6 keeps the larger error": _quantizer(
        "codes and block scales with 4over6", _larger_error, QUANTIZERS_OF[:2]
    ),
    "per-token scale of one row off by an ulp": _quantizer(
        "per-token scales, one row", _an_ulp_more
    ),
    "tactic 192 drops the last tile of an expert": _layer(
        (TRTLLM,), "the output of this tactic alone", _last_tile_dropped, "[192, 7]"
    ),
    "tactic 64 raises": _layer((TRTLLM,), "an error of this tactic alone", _fails, "[64, 5]"),
    "tactic 5 of cutlass drops the last tile of an expert": _layer(
        (CUTLASS,), "the output of this tactic alone", _last_tile_dropped, "gemm2 5"
    ),
    "intermediate kept in fp32": _layer(
        (TRTLLM,), "outputs per token: the intermediate's codes", _fp32_intermediate
    ),
    "base scale 1 of the intermediate": _layer(
        (TRTLLM, CUTE_DSL),
        "outputs per token: the intermediate's block scales",
        _stages(requantize=as_requantize(QUANTIZERS["base scale 1"])),
    ),
    "4over6 of the intermediate ignored": _layer(
        (TRTLLM, CUTE_DSL), "outputs under FLASHINFER_NVFP4_4OVER6=1", _plain_intermediate
    ),
    "per-token scale of another row": _layer(
        (TRTLLM, CUTE_DSL), "outputs per token", _wrong_token_scale
    ),
    "gate and up exchanged": _layer(
        (TRTLLM, CUTE_DSL), "outputs of gated activations", _gate_for_up
    ),
    "finalize in bf16": _layer(
        (TRTLLM, CUTE_DSL, CUTLASS),
        "outputs of more than one slot a token",
        _stages(finalize=other_finalize(in_bf16).finalize),
    ),
    "fused finalize": _layer(
        (CUTE_DSL, CUTLASS),
        "outputs: weights before the rounding of rows",
        lambda given: given | {"stages": fused_finalize(given["stages"])},
    ),
    "local offset ignored": _layer(
        (TRTLLM, CUTE_DSL, CUTLASS),
        "outputs of expert parallelism, from the second rank on",
        lambda given: given | {"local_expert_offset": 0},
    ),
    "first GEMM of cutlass not rounded": _layer(
        (CUTLASS,), "outputs of activations that are not exact", _first_gemm_in_fp32
    ),
    "ties to the larger index": Fault(
        "layer", (TRTLLM,), "outputs from logits with ties", Behaviour(route=_ties_to_the_larger)
    ),
    "the bias in the weights": Fault(
        "layer", (TRTLLM,), "outputs from logits with a bias", Behaviour(route=_bias_in_the_weights)
    ),
    "baselines' gate and up exchanged": _baseline(BASELINES, "outputs", _halves_exchanged),
    "MXFP8's scale rounded down": Fault(
        "baseline", (MXFP8,), "its quantizer", Behaviour(mxfp8=_scale_rounded_down)
    ),
    "baselines' local offset ignored": _baseline(
        BASELINES, "outputs of expert parallelism", lambda given: given | {"local_expert_offset": 0}
    ),
    "scale of the next block": _baseline((FP8_BLOCK, MXFP8), "outputs", _scale_of_the_next_block),
    "scale of the next token": _baseline((FP8_BLOCK, MXFP8), "outputs", _scale_of_the_next_token),
    "scale of the next expert": _baseline((FP8_TENSOR,), "outputs", _scale_of_the_next_expert),
    "tactic 16 drops the last expert": _baseline(
        BASELINES, "the output of this tactic alone", _last_expert_dropped, "[16, 19]"
    ),
    "last bit of every second call": Fault(
        "layer",
        (TRTLLM, CUTE_DSL, CUTLASS),
        "two runs of one call, and a graph's replay",
        Behaviour(output=_last_bit),
    ),
}
