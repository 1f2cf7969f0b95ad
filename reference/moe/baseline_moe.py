"""The layers beside NVFP4 in FlashInfer's test matrix, as baselines: BF16, FP8 and MXFP8 experts.

For each token t and slot k, with e = ids[t, k] an expert on this rank, values being codes times scales:

    accumulator1  sum over H of the token's and the first GEMM's values
    intermediate  activation(accumulator1), then by format
        bf16            rounded to bf16
        fp8 per tensor  activation(accumulator1, the expert's scalars), which hold the encode
                        scale of the intermediate, to e4m3
        fp8 block       accumulator1 to e4m3 by 1 x 128, the activation of that, the same again
        mxfp8           to e4m3 by 32, as `quantize_mxfp8`
    row           sum over I, times the expert's scalar (fp8 per tensor), to bf16
    output[t]     as in `layer.finalize`

Sources, in flashinfer-python 0.7.2.post1: `trtllm_fused_moe_runner.cu:443-459` (the first GEMM writes
the type of the activations, the second bf16), `:702-727` (the activation of fp8 block is a kernel of
its own, `trtllm_fused_moe_dev_kernel.cu:236`: SwiGLU alone, behind a first GEMM that has already
quantized, `trtllm_fused_moe_kernel_launcher.cu:4449-4462`), `fused_moe/prepare.py:1067-1076` (scalars).
Sums are taken in fp64 and rounded once to fp32.

Not determined by what FlashInfer ships, being inside cubins: the order of the sums and when a block's
scale meets its sum, the last bits of the activation, and the scales of what a first GEMM writes (fp8
block's, taken to be those of the kernel behind it, and mxfp8's, taken to be the quantizer's).
FlashInfer's trace references neither quantize nor round the intermediate.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..activation import ActivationType, activate, check_activation
from ..numerics.accumulate import matmul
from ..numerics.subnormals import kept
from ..weights.summary import one_line
from . import fp8
from .finalize import FinalizeOrder, finalize
from .fp8 import BLOCK, LEAST_OF_INTERMEDIATE, Scaled
from .layer import MoEResult

Format = Literal["bf16", "fp8 per tensor", "fp8 block", "mxfp8"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class BaselineExperts:
    """`num_local` experts; rows in their natural order, [up; gate] of gated activations."""

    format: Format
    activation: ActivationType
    w13: torch.Tensor  # [E, M1, H] bf16, or float8_e4m3fn codes
    w2: torch.Tensor  # [E, H, I]
    w13_scale: torch.Tensor | None = None
    """[E] fp32 encode (fp8 per tensor), [E, M1/128, H/128] fp32 decode (fp8 block), [E, M1, H/32]
    uint8 e8m0 (mxfp8)."""
    w2_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None  # [] fp32 encode scale, of fp8 per tensor
    intermediate_scale: torch.Tensor | None = None  # likewise

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def num_local(self) -> int:
        return self.w13.shape[0]

    @property
    def scalars(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[E] fp32 each: of the up half or the result, of the gate or the argument, of the row."""
        if self.format != "fp8 per tensor":
            one = torch.ones(self.num_local, dtype=torch.float32, device=self.w13.device)
            return one, one, one
        w13, w2, a, c = self.w13_scale, self.w2_scale, self.input_scale, self.intermediate_scale
        assert w13 is not None and w2 is not None and a is not None and c is not None
        up = c / (w13 * a) if self.activation.gated else c.expand_as(w13).contiguous()
        return up, 1.0 / (w13 * a), 1.0 / (c * w2)


@dataclass(frozen=True)
class BaselineActivations:
    """The hidden states of T tokens as the layer receives them."""

    hidden_states: torch.Tensor  # [T, H] bf16, or float8_e4m3fn codes
    scale: torch.Tensor | None = None  # [H/128, T] fp32 (fp8 block), [T, H/32] uint8 e8m0 (mxfp8)


@torch.no_grad()
@kept
def prepare_baseline(
    format: Format,
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: ActivationType = ActivationType.Swiglu,
    *,
    input_amax: float | None = None,
    intermediate_amax: float | None = None,
) -> BaselineExperts:
    """Ordinary weights, in a format.

    Args:
        w13: [E, 2 I, H] bf16, rows [up; gate] of gated activations, [E, I, H] of the others.
        w2: [E, H, I] bf16.
        input_amax, intermediate_amax: largest magnitudes of the layer's input and intermediate, of the
            static scales of fp8 per tensor.

    Raises:
        ValueError: an unknown format; shapes or dtypes that do not fit; H or I no multiple of 128, which
            FlashInfer's layers need; fp8 per tensor without both maxima; fp8 block with another
            activation than SwiGLU.
    """
    _check(format, w13, w2, activation)
    if format == "bf16":
        return BaselineExperts(format, activation, w13, w2)
    if format == "fp8 per tensor":
        if input_amax is None or intermediate_amax is None:
            missing = "input_amax" if input_amax is None else "intermediate_amax"
            raise ValueError(f"{missing} is None; fp8 per tensor has static scales")
        encode13, encode2 = (fp8.encode_scale(w.float().abs().amax((1, 2))) for w in (w13, w2))
        a, c = (
            fp8.encode_scale(torch.tensor(amax, dtype=torch.float32, device=w13.device))
            for amax in (input_amax, intermediate_amax)
        )
        codes13, codes2 = (
            fp8.quantize_per_tensor(w, s[:, None, None])
            for w, s in ((w13, encode13), (w2, encode2))
        )
        return BaselineExperts(format, activation, codes13, codes2, encode13, encode2, a, c)
    if format == "fp8 block":
        q13, q2 = fp8.quantize_blocks(w13, BLOCK), fp8.quantize_blocks(w2, BLOCK)
    else:
        q13, q2 = fp8.quantize_mxfp8(w13), fp8.quantize_mxfp8(w2)
    return BaselineExperts(format, activation, q13.codes, q2.codes, q13.scale, q2.scale)


@kept
def quantize_for(x: torch.Tensor, experts: BaselineExperts) -> BaselineActivations:
    """[T, H] bf16 hidden states in the format of the experts."""
    if experts.format == "bf16":
        return BaselineActivations(x)
    if experts.format == "fp8 per tensor":
        assert experts.input_scale is not None
        return BaselineActivations(fp8.quantize_per_tensor(x, experts.input_scale))
    if experts.format == "fp8 block":
        q = fp8.quantize_blocks(x)
        return BaselineActivations(q.codes, q.scale.T.contiguous())
    return BaselineActivations(*fp8.quantize_mxfp8(x))


@kept
def baseline_moe(
    activations: BaselineActivations,
    experts: BaselineExperts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    local_expert_offset: int = 0,
    finalize_order: FinalizeOrder = "flashinfer",
    round_intermediate: bool = True,
) -> MoEResult:
    """Everything after the routing; arguments as of `layer.fused_moe`.

    Args:
        round_intermediate: False leaves out the quantization or rounding of the intermediate, and the
            rounding of the rows: FlashInfer's trace references do.

    Returns:
        with "accumulator1" [T, K, M1] and "intermediate" [T, K, I], its values, among the steps.
    """
    x = hidden_values(activations, experts.format)
    tokens, top_k = ids.shape
    hidden, intermediate = experts.w2.shape[1:]
    up_scalar, gate_scalar, row_scalar = experts.scalars
    acc1 = torch.zeros(tokens, top_k, experts.w13.shape[1], dtype=torch.float32, device=x.device)
    middle = torch.zeros(tokens, top_k, intermediate, dtype=torch.float64, device=x.device)
    rows = torch.zeros(tokens, top_k, hidden, dtype=torch.float32, device=x.device)
    for e in range(experts.num_local):
        token, slot = (ids == e + local_expert_offset).nonzero(as_tuple=True)
        if not token.numel():
            continue
        w13, w2 = expert_values(experts, e)
        acc1[token, slot] = matmul(x[token], w13, "fp64")
        raw = acc1[token, slot]
        if experts.format == "fp8 block" and round_intermediate:
            raw = _of_128(raw).float()
        y = activate(raw, experts.activation, up_scalar[e], gate_scalar[e])
        middle[token, slot] = _rounded(y, experts.format) if round_intermediate else y.double()
        rows[token, slot] = matmul(middle[token, slot], w2, "fp64") * row_scalar[e]
    if round_intermediate:
        rows = rows.bfloat16().float()
    output = finalize(rows, weights, finalize_order).bfloat16()
    return MoEResult(output, rows.bfloat16(), {"accumulator1": acc1, "intermediate": middle})


def hidden_values(activations: BaselineActivations, format: Format) -> torch.Tensor:
    """[T, H] fp64: codes times scales; of fp8 per tensor the codes, whose scale is the scalars'."""
    codes, scale = activations.hidden_states, activations.scale
    if format == "fp8 block":
        assert scale is not None
        return fp8.block_values(Scaled(codes, scale.T))
    if format == "mxfp8":
        assert scale is not None
        return fp8.mx_values(Scaled(codes, scale))
    return codes.double()


def expert_values(experts: BaselineExperts, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13 [M1, H], w2 [H, I]) of one expert, fp64, as `hidden_values`."""

    def values(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if scale is None or experts.format == "fp8 per tensor":
            return codes[e].double()
        q = Scaled(codes[e], scale[e])
        return fp8.block_values(q, BLOCK) if experts.format == "fp8 block" else fp8.mx_values(q)

    return values(experts.w13, experts.w13_scale), values(experts.w2, experts.w2_scale)


def _rounded(y: torch.Tensor, format: Format) -> torch.Tensor:
    """The intermediate's values, fp64."""
    if format == "bf16":
        return y.bfloat16().double()
    if format == "fp8 per tensor":
        return fp8.quantize_per_tensor(
            y, torch.ones((), dtype=torch.float32, device=y.device)
        ).double()
    return _of_128(y) if format == "fp8 block" else fp8.mx_values(fp8.quantize_mxfp8(y))


def _of_128(y: torch.Tensor) -> torch.Tensor:
    return fp8.block_values(fp8.quantize_blocks(y, least=LEAST_OF_INTERMEDIATE))


def _check(format: Format, w13: torch.Tensor, w2: torch.Tensor, activation: ActivationType) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    check_activation(activation)
    if w13.dim() != 3 or w13.dtype != torch.bfloat16:
        raise ValueError(
            f"w13 is {w13.dtype} of shape {tuple(w13.shape)}; it must be bf16 [E, rows, H]"
        )
    num_experts, rows, hidden = w13.shape
    halves = 2 if activation.gated else 1
    wanted = (num_experts, hidden, rows // halves)
    if rows % halves or w2.dtype != torch.bfloat16 or tuple(w2.shape) != wanted:
        raise ValueError(
            f"w2 is {w2.dtype} of shape {tuple(w2.shape)}; with w13 of shape {tuple(w13.shape)} and "
            f"{activation.name} it must be bf16 {wanted}"
        )
    if hidden % BLOCK or wanted[2] % BLOCK:
        raise ValueError(
            f"w13 has shape {tuple(w13.shape)}: H = {hidden} and I = {wanted[2]} must be multiples "
            f"of {BLOCK}"
        )
    if format == "fp8 block" and activation != ActivationType.Swiglu:
        raise ValueError(f"activation is {activation.name}; fp8 block has SwiGLU alone")
