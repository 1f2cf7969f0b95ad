"""`nvfp4_quantize` on every backend, and `explain`: which one runs, and why not the others.

`auto` takes the first backend that can serve, for the build that was asked for. The choice never changes
the bits or the meaning of the result. A backend that was named never falls back.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

import torch

from ...reference import checks
from ...reference.layouts import from_linear, shuffle_rows
from ...reference.recipe import FLASHINFER, Build, FlashInferVersion, SfLayout
from .. import backends
from ..allocate import allocate
from ..backends import Asked, Backend, Operation
from ..flashinfer import quantize as fi
from .call import UNSET, QuantizeCall, check_values, make_quantize_call

Result = tuple[torch.Tensor, ...]
QuantizeBackend = Literal[
    "auto",
    "reference",
    "triton",
    "flashinfer",
    "flashinfer:cuda",
    "flashinfer:cute-dsl",
    "flashinfer:cake",
    "cuda",
    "cute-dsl",
    "cake",
]
"""The names that an editor offers for `backend`; `register_backend` adds others."""


def _on_flashinfer(name: str) -> Backend[QuantizeCall, Result]:
    """A row of the table. "auto" takes FlashInfer's backend of the build, and never cake."""

    def automatic(call: QuantizeCall) -> bool:
        return name == f"flashinfer:{call.recipe.build}"

    return Backend(
        name,
        lambda call: fi.refusal(name, call),
        lambda call: fi.quantize(name, call),  # cake has programs for some shapes only
        automatic,
    )


def _triton_refusal(call: QuantizeCall) -> str | None:
    return backends.triton_refusal_of(call.a, "a is", call.capability)


def _in_triton(call: QuantizeCall) -> Result:
    from .launch import quantize_global_scale, quantize_per_token

    return _quantize(quantize_per_token, quantize_global_scale, call)


def _in_reference(call: QuantizeCall) -> Result:
    from .ops import reference_global_scale, reference_per_token

    return _quantize(reference_per_token, reference_global_scale, call)


def _quantize(
    per_token: Callable[..., Result], global_scale: Callable[..., Result], call: QuantizeCall
) -> Result:
    """Run a call by an implementation's two functions, made of `ops.PerToken` and `ops.GlobalScale`."""
    layout = SfLayout.layout_linear if call.do_shuffle else call.layout
    result: Result
    if call.per_token:
        result = per_token(
            call.a,
            call.scale,
            call.recipe,
            layout,
            row_index=call.row_index,
            out_scale=call.out_scale,
        )
    else:
        result = global_scale(call.a, call.scale, call.recipe, layout, row_index=call.row_index)
    if not call.do_shuffle:
        return result
    order = shuffle_rows(call.m, device=call.a.device)
    codes, scales, *token = (t[order] for t in result)
    return codes, from_linear(scales, call.layout), *token


def _adopt(name: str, run: Callable[[QuantizeCall], Any]) -> Callable[[QuantizeCall], Result]:
    """Wrap the function of a user's backend, whose results are checked."""

    def adopted(call: QuantizeCall) -> Result:
        result = run(call)
        expected = allocate(call.a.to("meta"), call.layout)[: 3 if call.per_token else 2]
        backends.check_results(name, result, expected, call.a)
        return tuple(result)

    return adopted


_BATCH_INVARIANT = (
    "FlashInfer 0.7.4's batch-invariant quantizers are not served; build='cute-dsl', fast_math=False "
    "has their bits, but for the per-token scale of a row of zeros and NaN: it is 1 / FLT_MAX, ours 0"
)


def _notes(call: QuantizeCall) -> Sequence[str]:
    """List what FlashInfer's own outputs have not confirmed, and its quantizers of nearly these bits."""
    parts = {"do_shuffle": call.do_shuffle, "masked_m": call.masked_m is not None}
    notes = [
        f"not proven on FlashInfer, derived from its source: {part}"
        for part, present in parts.items()
        if present
    ]
    r = call.recipe
    if r.build == "cute-dsl" and r.math == "exact" and r.four_over_six is None:
        notes.append(_BATCH_INVARIANT)
    return notes


QUANTIZE: Operation[QuantizeCall, Result] = Operation(
    "nvfp4_quantize",
    [
        *map(_on_flashinfer, fi.RULES),
        Backend("triton", _triton_refusal, _in_triton, backends.on_gpu, launches=True),
        Backend("reference", backends.serves_all, _in_reference),
    ],
    aliases={
        "flashinfer": "flashinfer",  # that of the build
        **{name.removeprefix("flashinfer:"): name for name in fi.RULES},
    },
    notes=_notes,
    adopt=_adopt,
)
BACKENDS = QUANTIZE.names
"""Our own backends."""


def auto_order(build: Build) -> tuple[str, ...]:
    """The backends that "auto" tries for a build; flashinfer:cake, experimental there, is not one."""
    return f"flashinfer:{build}", "triton", "reference"


@overload
def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: SfLayout | int = ...,
    do_shuffle: bool = ...,
    sf_vec_size: int = ...,
    enable_pdl: bool | None = ...,
    backend: QuantizeBackend | str = ...,
    per_token_activation: Literal[False] = ...,
    expanded_idx_to_permuted_idx: torch.Tensor | None = ...,
    out_scale: torch.Tensor | None = ...,
    nvfp4_4over6: Any = ...,
    *,
    fast_math: bool | None = ...,
    build: Build | None = ...,
    flashinfer: FlashInferVersion = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: SfLayout | int = ...,
    do_shuffle: bool = ...,
    sf_vec_size: int = ...,
    enable_pdl: bool | None = ...,
    backend: QuantizeBackend | str = ...,
    *,
    per_token_activation: Literal[True],
    expanded_idx_to_permuted_idx: torch.Tensor | None = ...,
    out_scale: torch.Tensor | None = ...,
    nvfp4_4over6: Any = ...,
    fast_math: bool | None = ...,
    build: Build | None = ...,
    flashinfer: FlashInferVersion = ...,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: SfLayout | int = ...,
    do_shuffle: bool = ...,
    sf_vec_size: int = ...,
    enable_pdl: bool | None = ...,
    backend: QuantizeBackend | str = ...,
    per_token_activation: bool = ...,
    expanded_idx_to_permuted_idx: torch.Tensor | None = ...,
    out_scale: torch.Tensor | None = ...,
    nvfp4_4over6: Any = ...,
    *,
    fast_math: bool | None = ...,
    build: Build | None = ...,
    flashinfer: FlashInferVersion = ...,
) -> Result: ...
@QUANTIZE.served()
def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: QuantizeBackend | str = "auto",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    nvfp4_4over6: Any = UNSET,
    *,
    fast_math: bool | None = None,
    build: Build | None = None,
    flashinfer: FlashInferVersion = FLASHINFER,
) -> Asked[QuantizeCall]:
    """Quantize [M, K] to NVFP4: FlashInfer's `nvfp4_quantize`, on every backend.

    Names, order, meaning and returns of the positional arguments are those of flashinfer-python 0.7.2
    (`quantization/fp4_quantization.py:1578`); the default backend differs. Where a piece is not
    proven on FlashInfer's own outputs, `explain` says so.

    Args:
        a: [M, K] fp16 or bf16, K a multiple of 16, M any; float8_e4m3fn with a global scale; fp32 per
            token (reference and Triton only, fast math without 4over6, build cuda).
        a_global_sf: per token, the inverse base scale 1/2688 (1/1536 with e4m3_max 256); otherwise the
            encode scale 448 * 6 / amax, one fp32 element or M of them. A float, or a tensor.
        sfLayout: where the block scales lie, `SfLayout` or FlashInfer's own.
        do_shuffle: reorder rows for TRT-LLM's A operand; layout_128x4, M % 128 == 0, K % 64 == 0.
        sf_vec_size: 16.
        enable_pdl: passed on to FlashInfer, of no meaning elsewhere.
        backend: "auto", "reference", "triton", "flashinfer" (that of the build), "flashinfer:cuda",
            "flashinfer:cute-dsl", "flashinfer:cake"; FlashInfer's own "cuda", "cute-dsl" and "cake"
            mean the last three.
        per_token_activation: one fp32 scale for each row, returned third.
        expanded_idx_to_permuted_idx: int32 [>= M]; row r = idx[b], b < M, of `a` gives row r of the
            results; entries outside 0..M-1 are skipped, rows not named are zero. FlashInfer leaves
            rows not named undefined, and writes out of bounds for an entry of M or more.
        out_scale: one fp32 element that multiplies the returned per-token scales.
        nvfp4_4over6: a config, None for off; omitted, the FLASHINFER_NVFP4_4OVER6* variables decide.
        fast_math: False for IEEE divisions; None as FlashInfer's backend would read the environment.
            Under `torch.compile` that is read once, while tracing.
        build: whose bits at the edges, "cuda" (default) or "cute-dsl" (default of that backend).
        flashinfer: of which version, whatever is installed; FlashInfer of another version serves the
            calls whose bits both have (docs/flashinfer_versions.md).

    Returns:
        (codes uint8 [M, K/2], block scales uint8 [padded M, padded K/16]) and, per token, the fp32
        decode scales [M]. Padding is zero.

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    name, build = backend_and_build(backend, build)
    call = make_quantize_call(
        a,
        a_global_sf,
        sfLayout=sfLayout,
        do_shuffle=do_shuffle,
        sf_vec_size=sf_vec_size,
        enable_pdl=enable_pdl,
        per_token_activation=per_token_activation,
        expanded_idx_to_permuted_idx=expanded_idx_to_permuted_idx,
        out_scale=out_scale,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
        flashinfer=flashinfer,
    )
    check_values(call)
    return call, name


explain = QUANTIZE.explaining(nvfp4_quantize)


def backend_and_build(backend: str, build: Build | None) -> tuple[str, Build]:
    """Return the full name of a backend, or "auto", and the build that is asked for."""
    if build == "batch-invariant":
        raise ValueError(f"build is {build!r}; {_BATCH_INVARIANT}")
    if build is not None:
        checks.one_of("build", build, get_args(Build))
    name = QUANTIZE.check_name(backend)
    if name == "flashinfer":
        name = f"flashinfer:{build or 'cuda'}"
    return name, build or fi.BUILDS.get(name, "cuda")
