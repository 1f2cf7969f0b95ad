"""New weights into a layer's experts, in place: what an RL step hands from the trainer to the server.

Contract: afterwards the experts hold the bits that `prepare_experts` makes of the new weights, in the
same memory, with every scalar that depends on them; a CUDA graph that was captured before reads them
at its next replay. All that is wrong is said before anything is written. A caller on the same stream
sees the old layer or the new one.

    amax     of an expert's w13, gate and up together, and of its w2
    encode   (1 / amax) * (6 * e4m3_max), 1 where amax is 0, at most what `scalars.py` says
    decode   1 / encode
    rows     quantized with encode, shuffled, block scales in 128x4 (`experts.py`)

Every byte of these experts is written, padding included, so that nothing of them needs to have lasted: a
server that sleeps may drop their memory's pages. What `prepare_experts` was given beside the weights has
to be given again.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import checks
from ..numerics.subnormals import kept
from ..recipe import Recipe
from .arguments import Options
from .copies import refresh_layouts
from .experts import Experts
from .layout import lay_out, lay_out_bias
from .prepare import quantize_weight
from .scalars import (
    in_raw_units,
    largest_added,
    most_encode_scale,
    per_expert,
    product,
    quotient,
    static_encode_scale,
)
from .update_arguments import check
from .versions import mark_written
from .writers import WRITERS


@dataclass(frozen=True)
class Job:
    """New weights of one GEMM of some experts, and everything that follows from them."""

    w: torch.Tensor  # [n, rows, K] bf16 or fp16
    amax: torch.Tensor | None  # [n] fp32; None: of w
    gated: bool  # rows are [up; gate]
    codes: torch.Tensor  # [n, padded rows, padded K / 2] uint8, written
    block_scales: torch.Tensor  # [n, padded rows, padded K / 16] e4m3, written
    added: torch.Tensor | None  # [n] fp32, from `scalars.largest_added`
    scalar: torch.Tensor  # [n] fp32, becomes decode / divisor
    divisor: torch.Tensor | None  # [1] fp32; None: 1
    up_scalar: torch.Tensor | None  # [n] fp32, becomes scalar * factor
    factor: torch.Tensor | None  # [1] fp32; None: 1


Writer = Callable[[Sequence[Job], Recipe], None]
"""Does jobs, padding included. Nothing else of a reload is done more than one way."""


def write_by_reference(jobs: Sequence[Job], recipe: Recipe) -> None:
    """The specification of a `Writer`; an expert at a time."""
    for job in jobs:
        rows, columns = job.codes.shape[1], job.codes.shape[2] * 2
        rows //= 2 if job.gated else 1
        most = most_encode_scale(job.divisor, job.added)
        for e in range(job.w.shape[0]):
            amax = job.w[e].abs().amax() if job.amax is None else job.amax[e]
            own = most if isinstance(most, float) else most.expand(len(job.w))[e]
            codes, scales, decode = quantize_weight(job.w[e], amax, recipe, own)
            codes, scales = lay_out(codes[None], scales[None], job.gated, rows, columns)
            job.codes[e].copy_(codes[0])
            job.block_scales[e].copy_(scales[0])
            one = slice(e, e + 1)
            job.scalar[one].copy_(quotient(decode, job.divisor))
            if job.up_scalar is not None:
                job.up_scalar[one].copy_(product(job.scalar[one], job.factor))


@kept
def load_(
    experts: Experts,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    first: int,
    amax: tuple[torch.Tensor, torch.Tensor] | None,
    recipe: Recipe | None,
    options: Options,
    backend: str,
) -> None:
    """`Experts.load_`, which has the arguments' meaning, and defaults."""
    options = check(experts, w13, w2, first, amax, recipe, options)
    write = _writer(backend, w13.device)
    n = w13.shape[0]
    if n == 0:
        return
    some = slice(first, first + n)
    # Without a graph; and tensors that were made in this mode can be written in no other.
    with torch.inference_mode():
        _write_static_scales(experts, some, options)
        jobs = _jobs(experts, some, (w13, w2), amax or (None, None), _added(experts, n, options))
        write(jobs, recipe or Recipe("exact"))
        _write_parameters(experts, some, options)
        refresh_layouts(experts, some)
    mark_written(experts)


def _jobs(
    e: Experts,
    some: slice,
    weights: tuple[torch.Tensor, torch.Tensor],
    amax: Sequence[torch.Tensor | None],
    added: Sequence[torch.Tensor | None],
) -> tuple[Job, Job]:
    """Scalars as `assemble_experts` makes them of decode scales that gate and up share."""
    first = Job(
        weights[0],
        amax[0],
        e.activation.gated,
        e.gemm1_weights[some],
        e.gemm1_weights_scale[some],
        added[0],
        e.output1_scale_gate_scalar[some],
        e.input_scale,
        e.output1_scale_scalar[some] if e.activation.linear_up else None,
        e.intermediate_scale,
    )
    second = Job(
        weights[1],
        amax[1],
        False,
        e.gemm2_weights[some],
        e.gemm2_weights_scale[some],
        added[1],
        e.output2_scale_scalar[some],
        e.intermediate_scale,
        None,
        None,
    )
    return first, second


def _added(e: Experts, n: int, options: Options) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The largest magnitudes of what is added to the accumulators of the two GEMMs."""
    raw = e.activation.is_raw("beta")
    beta = per_expert(options.beta, n, e.gemm1_weights.device) if raw else None
    return largest_added(options.w13_bias, beta), largest_added(options.w2_bias)


def _write_static_scales(e: Experts, some: slice, options: Options) -> None:
    """Before the weights' scalars, which have these in them."""
    for scale, amax in (
        (e.input_scale, options.input_amax),
        (e.intermediate_scale, options.intermediate_amax),
    ):
        if scale is not None and amax is not None:
            scale.fill_(static_encode_scale(amax))
    if not e.activation.linear_up:
        c = e.intermediate_scale
        up = e.output1_scale_scalar[some]
        up.fill_(1.0) if c is None else up.copy_(c.expand_as(up))


def _write_parameters(e: Experts, some: slice, options: Options) -> None:
    """After the weights' scalars, by which biases and parameters in raw units are divided."""
    gate, gated = e.output1_scale_gate_scalar[some], e.activation.gated
    if e.gemm1_bias is not None and options.w13_bias is not None:
        rows = e.padded_intermediate_size
        e.gemm1_bias[some].copy_(lay_out_bias(options.w13_bias, gate[:, None], gated, rows))
    if e.gemm2_bias is not None and options.w2_bias is not None:
        divisor = e.output2_scale_scalar[some, None]
        bias = lay_out_bias(options.w2_bias, divisor, False, e.padded_hidden_size)
        e.gemm2_bias[some].copy_(bias)
    for name in e.activation.parameters:
        old, new = getattr(e, f"gemm1_{name}"), getattr(options, name)
        raw = e.activation.is_raw(name)
        if old is not None and (value := per_expert(new, len(gate), gate.device)) is not None:
            old[some].copy_(in_raw_units(value, gate) if raw else value)


def _writer(backend: str, device: torch.device) -> Writer:
    checks.one_of("backend", backend, ("auto", "reference", *WRITERS))
    if backend == "reference":
        return write_by_reference
    if backend == "auto":
        faster = WRITERS.get("triton") if device.type == "cuda" else None
        writer = faster(device)[0] if faster else None
        return writer or write_by_reference
    writer, reason = WRITERS[backend](device)
    if writer is None:
        raise ValueError(f"backend {backend} cannot load these weights: {reason}")
    return writer
