"""One call, `nvfp4_quantize`, over every backend; which one runs, and why not the others.

`auto` takes the first backend of `ORDER` that can serve, for the build that was asked for. The choice
never changes the bits or the meaning of the result. A backend that was named never falls back.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..reference import checks
from ..reference.layouts import from_linear
from ..reference.recipe import Build, SfLayout
from ..reference.shuffle import shuffle_rows
from .flashinfer import quantize as fi
from .quantize_call import UNSET, Backend, QuantizeCall, check_values, make_quantize_call

ORDER = ("flashinfer:<build>", "triton", "reference")
"""What `auto` tries, in order; flashinfer:cake, experimental there, is never its choice."""

BACKENDS: tuple[str, ...] = get_args(Backend)
_FLASHINFER_NAMES = {"cuda", "cute-dsl", "cake"}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger("nvfp4_moe")


class UnsupportedError(ValueError):
    """A backend that was named cannot serve the call; the message has the reason."""


@dataclass(frozen=True)
class Explanation:
    """What `nvfp4_quantize` would do; printing it gives a table."""

    backend: str | None  # that would run; None if the call is invalid or the named one cannot
    reasons: tuple[tuple[str, str | None], ...]  # of every backend, None where it can serve
    notes: tuple[str, ...] = ()

    def reason(self, backend: str) -> str | None:
        """Why this backend cannot serve; None if it can."""
        return dict(self.reasons)[backend]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.reasons)
        lines = [f"would run: {self.backend or 'nothing'}"]
        lines += [
            f"  {name:<{width}}  {'can serve' if reason is None else 'no: ' + reason}"
            for name, reason in self.reasons
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def nvfp4_quantize(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: Any = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    nvfp4_4over6: Any = UNSET,
    *,
    fast_math: bool | None = None,
    build: Build | None = None,
) -> tuple[torch.Tensor, ...]:
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

    Returns:
        (codes uint8 [M, K/2], block scales uint8 [padded M, padded K/16]) and, per token, the fp32
        decode scales [M]. Padding is zero.

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    name, build = _backend_and_build(backend, build)
    request = make_quantize_call(
        a,
        a_global_sf,
        sfLayout,
        do_shuffle,
        sf_vec_size,
        enable_pdl,
        per_token_activation,
        expanded_idx_to_permuted_idx,
        out_scale,
        nvfp4_4over6,
        fast_math,
        build,
    )
    check_values(request)
    if name == "auto":
        name = _choose(request)
    elif (reason := refusal(name, request)) is not None:
        raise UnsupportedError(f"backend {name} cannot serve this call: {reason}")
    return run(name, request)


def explain(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: Any = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    nvfp4_4over6: Any = UNSET,
    *,
    fast_math: bool | None = None,
    build: Build | None = None,
    capability: tuple[int, int] | None = None,
) -> Explanation:
    """Which backend `nvfp4_quantize` of the same arguments would run, and why each other would not.

    Nothing is computed; meta tensors do. `capability=(9, 0)` asks about another GPU than the one `a`
    is on. An invalid call is explained, not raised.
    """
    try:
        name, build = _backend_and_build(backend, build)
        request = make_quantize_call(
            a,
            a_global_sf,
            sfLayout,
            do_shuffle,
            sf_vec_size,
            enable_pdl,
            per_token_activation,
            expanded_idx_to_permuted_idx,
            out_scale,
            nvfp4_4over6,
            fast_math,
            build,
            capability,
        )
        check_values(request)
    except (TypeError, ValueError) as error:
        return Explanation(None, tuple((b, str(error)) for b in BACKENDS))
    reasons = tuple((b, refusal(b, request)) for b in BACKENDS)
    if name == "auto":
        name = _choose(request)
    chosen = name if dict(reasons)[name] is None else None
    return Explanation(chosen, reasons, tuple(_notes(request)))


def auto_order(build: Build) -> tuple[str, ...]:
    """The backends that `auto` tries for a build."""
    return tuple(name.replace("<build>", build) for name in ORDER)


def refusal(backend: str, r: QuantizeCall) -> str | None:
    """Why a backend cannot serve the request; None if it can."""
    if backend in fi.RULES:
        return fi.refusal(backend, r)
    return triton_refusal_of(r.a, "a is", r.capability) if backend == "triton" else None


def run(backend: str, r: QuantizeCall) -> tuple[torch.Tensor, ...]:
    """Run the request on a backend that `refusal` let pass."""
    if backend in fi.RULES:
        try:
            return fi.quantize(backend, r)
        except NotImplementedError as error:  # cake has programs for some shapes only
            raise UnsupportedError(f"backend {backend} cannot serve this call: {error}") from error
    if backend == "triton":
        from . import quantize as ours
    else:
        from . import reference_ops as ours  # type: ignore[no-redef]
    layout = SfLayout.layout_linear if r.do_shuffle else r.layout
    result: tuple[torch.Tensor, ...]
    if r.per_token:
        result = ours.quantize_per_token(
            r.a, r.scale, r.recipe, layout, row_index=r.row_index, out_scale=r.out_scale
        )
    else:
        result = ours.quantize_global_scale(r.a, r.scale, r.recipe, layout)
    if not r.do_shuffle:
        return result
    order = shuffle_rows(r.m, device=r.a.device)
    codes, scales, *token = (t[order] for t in result)
    return codes, from_linear(scales, r.layout), *token


def triton_refusal_of(t: torch.Tensor, what: str, capability: tuple[int, int] | None) -> str | None:
    """Why Triton cannot run on the tensor (`what` it is, "a is") or on the GPU asked about."""
    if not _HAS_TRITON:
        return "triton is not installed"
    from . import target

    if capability is not None:
        if capability >= target.MIN_CAPABILITY:
            return None
        return f"sm_{capability[0]}{capability[1]} is before sm_80"
    if t.device.type == "cpu" and target.INTERPRETING:
        return None
    return (
        f"{what} on the {t.device.type}; Triton runs on a GPU, or on the CPU in its interpreter "
        "(TRITON_INTERPRET=1 set before the first import)"
    )


def _choose(r: QuantizeCall) -> str:
    """The backend of `auto`. It never picks the interpreter: a CPU tensor goes to the reference."""
    if r.capability is None:
        return "reference"
    for name in auto_order(r.recipe.build):
        reason = refusal(name, r)
        if reason is None:
            return name
        if r.capability >= (10, 0) and not torch.compiler.is_compiling():
            _log_once(name, reason)
    raise AssertionError("the reference serves every valid request")


@functools.lru_cache(maxsize=256)
def _log_once(backend: str, reason: str) -> None:
    _log.info("%s cannot serve, falling back: %s", backend, reason)


def _backend_and_build(backend: str, build: Build | None) -> tuple[str, Build]:
    """The full name of a backend, or "auto", and the build that is asked for."""
    checks.one_of("backend", backend, ("auto", "flashinfer", *BACKENDS, *sorted(_FLASHINFER_NAMES)))
    if build is not None:
        checks.one_of("build", build, get_args(Build))
    name = f"flashinfer:{backend}" if backend in _FLASHINFER_NAMES else backend
    if name == "flashinfer":
        name = f"flashinfer:{build or 'cuda'}"
    return name, build or fi.BUILDS.get(name, "cuda")


def _notes(r: QuantizeCall) -> list[str]:
    """What of the request FlashInfer's own outputs have not proven."""
    parts = {
        'build="cute-dsl" (the golden outputs are of the CUDA build)': r.recipe.build == "cute-dsl",
        "4over6 with a global scale": not r.per_token and r.recipe.four_over_six is not None,
        "one global scale a row": r.by_row,
        "float8_e4m3fn input": r.a.dtype == torch.float8_e4m3fn,
        "do_shuffle": r.do_shuffle,
        "out_scale": r.out_scale is not None,
        "expanded_idx_to_permuted_idx": r.row_index is not None,
    }
    return [
        f"not proven on FlashInfer, derived from its source: {part}"
        for part, present in parts.items()
        if present
    ]
