"""Calls of the operations beside the mixture of experts: reload, producers, the dense product."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.cases.moe_case import to_device
from nvfp4_moe.differential.verdict import unequal
from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.call import KernelCall as DenseKernelCall
from nvfp4_moe.kernels.fused_quantize import launch as fused_quantize_launch
from nvfp4_moe.kernels.fused_quantize.call import KernelCall as FusedKernelCall
from nvfp4_moe.kernels.moe.hopper.config import RingConfig
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.weights import launch as weights_launch
from nvfp4_moe.reference import dense, fused_quantize
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.dense import mm_fp4_bounds
from nvfp4_moe.reference.layouts import from_linear
from nvfp4_moe.reference.quantize import Quantized, quantize_per_token
from nvfp4_moe.reference.recipe import Recipe, SfLayout
from nvfp4_moe.reference.weights.prepare import prepare_experts

from ..calls import Answered, Call
from .part_calls import exactly
from .strict import codes_multiplied

Tensor = torch.Tensor


@dataclass(frozen=True)
class ReloadCall:
    """Weights written into prepared experts, which must be those prepared anew."""

    kind: ActivationType
    recipe: Recipe
    dtype: torch.dtype = torch.bfloat16
    static: bool = False
    small: bool = (
        False  # weights whose scale is limited by the bias that is added to their products
    )

    def _experts(self, seed: int) -> tuple[Any, tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        rows = 80 * (2 if self.kind.gated else 1)
        w13 = host.normal(g, 2, rows, 144) * host.powers(host.arange(2) * 3)[:, None, None]
        w2 = host.normal(g, 2, 144, 80)
        w13[0, :, :16], w2[1] = 0, 0
        if self.small:
            w13, w2 = w13 * 2.0**-110, w2 * 2.0**-112
        w = w13.to(self.dtype), w2.to(self.dtype)
        return prepare_experts(*w, self.kind, recipe=self.recipe, **self._options()), w

    def _options(self, device: str = "cpu") -> dict[str, Any]:
        amax = {"input_amax": 3.0, "intermediate_amax": 5.0} if self.static else {}
        if not self.small:
            return amax
        sizes = host.fp32([[3.0 * 2.0**20], [5.0 * 2.0**31]])
        rows = {"w13_bias": 80 * (2 if self.kind.gated else 1), "w2_bias": 144}
        return amax | {name: sizes.expand(2, n).to(device) for name, n in rows.items()}

    def answer(self, device: str = "cpu") -> Any:
        experts = to_device(self._experts(0)[0], device)
        w13, w2 = (w.to(device) for w in self._experts(1)[1])
        experts.load_(w13, w2, recipe=self.recipe, backend="triton", **self._options(device))
        return to_device(experts, "cpu")

    def judge(self) -> Answered:
        return exactly(self._experts(1)[0])


@dataclass(frozen=True)
class AmaxCall:
    """The largest magnitudes of two experts that have 2,048 programs each, of four steps."""

    def _weights(self) -> Tensor:
        w = host.normal(torch.Generator().manual_seed(4), 2, 256, 256)
        w[0, -1, -1], w[1, -1, -40] = 7.0, -9.0
        return w.bfloat16()

    def answer(self, device: str = "cpu") -> Tensor:
        w = self._weights().to(device)
        bits = torch.zeros(2, dtype=torch.int32, device=device)
        with mock.patch.object(weights_launch, "_WORDS", 16):
            weights_launch._launch_amax(w, bits)
        return bits.view(torch.float32).cpu()

    def judge(self) -> Answered:
        return exactly(host.fp32([7.0, 9.0]))


@dataclass(frozen=True)
class ProducerCall:
    """SiLU-and-mul, or an RMSNorm, with the quantizer behind it: every bit."""

    kind: int
    recipe: Recipe
    layout: SfLayout
    dtype: torch.dtype = torch.bfloat16
    fused: bool | None = None
    scale: Literal["number", "tensor"] = "number"
    rows: int = 9

    def _given(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        g = torch.Generator().manual_seed(3)
        m = self.rows
        x = host.normal(g, m, 80) * host.powers(host.integers(g, -9, 7, (m, 1)))
        x[1], x[2, ::5] = 0, -0.0
        x[4] *= 2.0**-120 if self.dtype == torch.bfloat16 else 2.0**-10
        x[5] *= 8
        x[3, 16:32] *= 2.0**-18  # a block whose scale is zero
        if self.kind == fused_quantize_launch.k.SILU_AND_MUL.value:
            if self.dtype == torch.float16:  # results that an ulp of the divisor changes
                x[6:8, :80] = 0.0
                x[6:8, 0], x[1:3, 0] = host.fp32([-0.7138671875, 16.640625]), host.fp32([1.5, 1.0])
            return torch.cat((x, x.flip(0)), 1).to(self.dtype), None, None
        residual = None
        if self.kind == fused_quantize_launch.k.ADD_RMSNORM.value:
            residual = (x.flip(1) / 3).to(self.dtype)
        return x.to(self.dtype), host.normal(g, 80).to(self.dtype), residual

    def answer(self, device: str = "cpu") -> Any:
        x, weight, residual = (None if t is None else t.to(device) for t in self._given())
        assert x is not None
        scale: float | Tensor = self.recipe.base_scale_inv
        if self.scale == "tensor":  # beside another number
            scale = host.fp32([scale, 7.0]).to(device)[:1]
        call = FusedKernelCall(x, weight, 1e-5, scale, self.recipe, self.layout)
        got = fused_quantize_launch.fused_quantize(call, residual, self.fused)
        return [t.cpu() for t in (*got, *([] if residual is None else [residual]))]

    def judge(self) -> Answered:
        x, weight, residual = self._given()
        if weight is None:
            values = fused_quantize.silu_and_mul(x, self.recipe.build)
        elif residual is None:
            values = fused_quantize.rmsnorm(x, weight, 1e-5)
        else:
            values, residual = fused_quantize.add_rmsnorm(x, residual, weight, 1e-5)
        q: Quantized = quantize_per_token(
            values, self.recipe.base_scale_inv, self.recipe, self.layout
        )
        assert q.per_token_scale is not None
        added = [] if residual is None else [residual]
        return exactly([q.codes, q.block_scales, q.per_token_scale, *added])


_NAN = 0x7F  # in e4m3


def _padded_with_nan(scales: Tensor, layout: SfLayout) -> Tensor:
    padding = from_linear(torch.ones_like(scales), layout) == 0
    return from_linear(scales, layout).masked_fill(padding, _NAN)


@dataclass(frozen=True)
class ProductCall:
    """[M, K] times [N, K] transposed, of ragged sizes, judged by intervals and where exact by bits.

    What pads block scales is NaN. Not where exact, a block of `a` and one of `b` are NaN. The row behind
    the result is NaN, and has to stay so.
    """

    config: GemmConfig | RingConfig
    use_8x4: bool = False
    by_row: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    m: int = 19
    k: int = 208
    n: int = 136
    scaled: bool = True  # by alpha

    def _given(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        g = torch.Generator().manual_seed(self.m)
        mask = 0xAA if self.exact else 0xFF
        a, b = (
            host.integers(g, 0, 256, (rows, self.k // 2)).to(torch.uint8) & mask
            for rows in (self.m, self.n)
        )
        high = 0x38 if self.exact else 0x3A
        sa, sb = (
            host.integers(g, high if self.exact else 1, high + 1, (rows, self.k // 16)).to(
                torch.uint8
            )
            for rows in (self.m, self.n)
        )
        if not self.exact:
            sa[1, 0] = sb[2, -1] = _NAN
        alpha = 0.3 + host.arange(self.m if self.by_row else 1).float() if self.scaled else None
        a_scales = _padded_with_nan(sa, dense.a_layout(self.use_8x4))
        return (a, b, a_scales, _padded_with_nan(sb, SfLayout.layout_128x4)), alpha

    def answer(self, device: str = "cpu") -> Tensor:
        (a, b, sa, sb), alpha = self._given()
        a, b, sa, sb = (t.to(device) for t in (a, b, sa, sb))
        alpha = None if alpha is None else alpha.to(device)
        size = (self.m + 1, b.shape[0])
        whole = torch.full(size, torch.nan, dtype=self.out_dtype, device=device)
        call = DenseKernelCall(a, b, sa, sb, alpha, self.use_8x4)
        dense_launch.mm_fp4(call, whole[: self.m], self.config)
        return whole.cpu()

    def judge(self) -> Answered:
        (a, b, sa, sb), alpha = self._given()
        want = dense.mm_fp4(a, b.T, sa, sb.T, alpha, self.out_dtype, use_8x4_sf_layout=self.use_8x4)
        bounds = mm_fp4_bounds(
            a, b.T, sa, sb.T, alpha, self.out_dtype, use_8x4_sf_layout=self.use_8x4
        )

        def accepts(whole: Tensor) -> bool:
            got, behind = whole[:-1], whole[-1]
            wrong = unequal(got, want) if self.exact else ~bounds.contains(got)
            return bool(behind.isnan().all()) and not wrong.any()

        return Answered(accepts, lambda whole: whole[:-1].double(), want.double())


@dataclass(frozen=True)
class NativeCall:
    """A call by the path of GPUs that multiply codes, in the interpreter."""

    call: Call

    def answer(self, device: str = "cpu") -> Any:
        with codes_multiplied():
            return self.call.answer(device)

    def judge(self) -> Answered:
        return self.call.judge()
