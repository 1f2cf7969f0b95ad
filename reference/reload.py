"""New weights into a layer's experts, in place: what an RL step hands from the trainer to the server.

Contract: afterwards the experts hold the bits that `prepare_experts` makes of the new weights, in the
same memory, with every scalar that depends on them; a CUDA graph that was captured before reads them
at its next replay. All that is wrong is said before anything is written. A caller on the same stream
sees the old layer or the new one.

    amax     of an expert's w13, gate and up together, and of its w2
    encode   (1 / amax) * (6 * e4m3_max), 1 where amax is 0;  decode = 1 / encode
    rows     quantized with encode, shuffled, block scales in 128x4 (`experts.py`)

What does not depend on weights stays: static activation scales, alpha, SiTU's beta. Biases, SwiGLU's
beta and the clamp limit are held divided by scalars that change, and have to be given again.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .activation import ActivationType
from .cute_dsl import refresh_cute_dsl
from .cutlass import refresh_cutlass
from .experts import Experts, lay_out, lay_out_bias, quantize_weight
from .recipe import Recipe
from .scalars import in_raw_units


@dataclass(frozen=True)
class Job:
    """New weights of one GEMM of some experts, and everything that follows from them."""

    w: torch.Tensor  # [n, rows, K] bf16 or fp16
    amax: torch.Tensor | None  # [n] fp32; None: of w
    gated: bool  # rows are [up; gate]
    codes: torch.Tensor  # [n, padded rows, padded K / 2] uint8, written
    block_scales: torch.Tensor  # [n, padded rows, padded K / 16] e4m3, written
    scalar: torch.Tensor  # [n] fp32, becomes decode / divisor
    divisor: torch.Tensor | None  # [1] fp32; None: 1
    up_scalar: torch.Tensor | None  # [n] fp32, becomes scalar * factor
    factor: torch.Tensor | None  # [1] fp32; None: 1


Writer = Callable[[Sequence[Job], Recipe], None]
"""Does jobs. Nothing else of a reload is done more than one way."""


def write_by_reference(jobs: Sequence[Job], recipe: Recipe) -> None:
    """The specification of a `Writer`; an expert at a time."""
    for job in jobs:
        rows, columns = job.codes.shape[1], job.codes.shape[2] * 2
        rows //= 2 if job.gated else 1
        for e in range(job.w.shape[0]):
            amax = job.w[e].abs().amax() if job.amax is None else job.amax[e]
            codes, scales, decode = quantize_weight(job.w[e], amax, recipe)
            codes, scales = lay_out(codes[None], scales[None], job.gated, rows, columns)
            job.codes[e].copy_(codes[0])
            job.block_scales[e].copy_(scales[0])
            one = slice(e, e + 1)
            job.scalar[one].copy_(decode if job.divisor is None else decode / job.divisor)
            if job.up_scalar is not None:
                scalar = job.scalar[one]
                job.up_scalar[one].copy_(scalar if job.factor is None else scalar * job.factor)


WRITERS: dict[str, Callable[[torch.device], tuple[Writer | None, str]]] = {
    "reference": lambda device: (write_by_reference, "")
}
"""By backend: a writer for a device, or None and why there is none. `kernels/reload.py` adds its own."""


def load_(
    experts: Experts,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    first: int,
    amax: tuple[torch.Tensor, torch.Tensor] | None,
    recipe: Recipe | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    beta: torch.Tensor | float | None,
    clamp_limit: torch.Tensor | float | None,
    backend: str,
) -> None:
    """`Experts.load_`, which has the arguments' meaning, and defaults."""
    _check(experts, w13, w2, first, amax, w13_bias, w2_bias, beta, clamp_limit)
    write = _writer(backend, w13.device)
    recipe = recipe or Recipe("exact")
    some = slice(first, first + w13.shape[0])
    if w13.shape[0] == 0:
        return
    write(_jobs(experts, some, w13, w2, *(amax or (None, None))), recipe)
    _update_parameters(experts, some, w13_bias, w2_bias, beta, clamp_limit)
    refresh_cute_dsl(experts, some)
    refresh_cutlass(experts, some)


def _jobs(
    e: Experts,
    some: slice,
    w13: torch.Tensor,
    w2: torch.Tensor,
    amax13: torch.Tensor | None,
    amax2: torch.Tensor | None,
) -> tuple[Job, Job]:
    """Scalars as `assemble_experts` makes them of decode scales that gate and up share."""
    first = Job(
        w13, amax13, e.activation.gated, e.gemm1_weights[some], e.gemm1_weights_scale[some],
        e.output1_scale_gate_scalar[some], e.input_scale,
        e.output1_scale_scalar[some] if e.activation.linear_up else None, e.intermediate_scale,
    )  # fmt: skip
    second = Job(
        w2, amax2, False, e.gemm2_weights[some], e.gemm2_weights_scale[some],
        e.output2_scale_scalar[some], e.intermediate_scale, None, None,
    )  # fmt: skip
    return first, second


def _update_parameters(
    e: Experts,
    some: slice,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    beta: torch.Tensor | float | None,
    clamp_limit: torch.Tensor | float | None,
) -> None:
    gate, gated = e.output1_scale_gate_scalar[some], e.activation.gated
    if e.gemm1_bias is not None and w13_bias is not None:
        rows = e.padded_intermediate_size
        e.gemm1_bias[some].copy_(lay_out_bias(w13_bias, gate[:, None], gated, rows))
    if e.gemm2_bias is not None and w2_bias is not None:
        divisor = e.output2_scale_scalar[some, None]
        e.gemm2_bias[some].copy_(lay_out_bias(w2_bias, divisor, False, e.padded_hidden_size))
    for held, new in ((e.gemm1_beta, beta), (e.gemm1_clamp_limit, clamp_limit)):
        if held is None or new is None:
            continue
        if not isinstance(new, torch.Tensor):
            # A tensor made of the number would be a copy from the host, which no graph captures.
            new = torch.full_like(gate, new)
        held[some].copy_(in_raw_units(new.to(gate), gate))


def _writer(backend: str, device: torch.device) -> Writer:
    if backend == "auto":
        faster = WRITERS.get("triton") if device.type == "cuda" else None
        writer = faster(device)[0] if faster else None
        return writer or write_by_reference
    if backend not in WRITERS:
        allowed = ", ".join(["auto", *WRITERS])
        raise ValueError(f"backend is {backend!r}; it must be one of {allowed}")
    writer, reason = WRITERS[backend](device)
    if writer is None:
        raise ValueError(f"backend {backend} cannot load these weights: {reason}")
    return writer


def _check(
    e: Experts,
    w13: torch.Tensor,
    w2: torch.Tensor,
    first: int,
    amax: tuple[torch.Tensor, torch.Tensor] | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    beta: torch.Tensor | float | None,
    clamp_limit: torch.Tensor | float | None,
) -> None:
    device = e.gemm1_weights.device
    if not isinstance(w13, torch.Tensor) or w13.dtype not in (torch.bfloat16, torch.float16):
        given = w13.dtype if isinstance(w13, torch.Tensor) else type(w13).__name__
        raise ValueError(f"w13 is {given}; it must be a bf16 or fp16 tensor")
    n = w13.shape[0] if w13.dim() else 0
    rows = e.intermediate_size * (2 if e.activation.gated else 1)
    shapes: dict[str, tuple[torch.Tensor | None, tuple[int, ...], torch.dtype | None]] = {
        "w13": (w13, (n, rows, e.hidden_size), w13.dtype),
        "w2": (w2, (n, e.hidden_size, e.intermediate_size), w13.dtype),
        "w13_bias": (w13_bias, (n, rows), None),
        "w2_bias": (w2_bias, (n, e.hidden_size), None),
    }
    if amax is not None:
        if not isinstance(amax, tuple | list) or len(amax) != 2:
            raise ValueError("amax must be two tensors: largest magnitudes of w13 and of w2")
        shapes["amax[0]"] = amax[0], (n,), torch.float32
        shapes["amax[1]"] = amax[1], (n,), torch.float32
    for name, (t, shape, dtype) in shapes.items():
        if t is None and name.endswith("bias"):
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} is {type(t).__name__}; it must be a tensor {list(shape)}")
        if tuple(t.shape) != shape or t.dtype != (dtype or t.dtype) or t.device != device:
            raise ValueError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}; these experts take "
                f"{dtype or 'a float dtype'} {list(shape)} on {device}"
            )
    if type(first) is not int or not 0 <= first <= first + n <= e.num_local:
        raise ValueError(f"first is {first!r}; {n} experts from there must be of {e.num_local}")
    for name, value in (("beta", beta), ("clamp_limit", clamp_limit)):
        if isinstance(value, torch.Tensor) and tuple(value.shape) not in ((), (n,)):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be [{n}]")
    if beta is not None and e.activation == ActivationType.Situ:
        raise ValueError("beta is given; SiTU's does not depend on the weights: leave it out")
    swiglu_beta = e.gemm1_beta if e.activation.linear_up else None
    for name, held, new in (
        ("w13_bias", e.gemm1_bias, w13_bias),
        ("w2_bias", e.gemm2_bias, w2_bias),
        ("beta", swiglu_beta, beta),
        ("clamp_limit", e.gemm1_clamp_limit, clamp_limit),
    ):
        if held is not None and new is None:
            raise ValueError(
                f"{name} is missing: the experts hold it divided by a scalar of their weights; give it "
                "with the weights"
            )
        if held is None and new is not None:
            raise ValueError(f"{name} is given; these experts were prepared without")
