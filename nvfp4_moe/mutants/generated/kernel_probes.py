"""What the Triton kernels are asked, a module at a time; in the interpreter or on a GPU."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ... import host
from ...cases import moe_edges as matrix_edges
from ...cases import quantize as matrix
from ...differential.verdict import unequal
from ...kernels import dense as triton_dense
from ...kernels import producer_launch
from ...kernels.config_cache import GemmConfig
from ...reference import dense
from ...reference import fused_quantize as producers
from ...reference.activation import ActivationType
from ...reference.bounds.dense import mm_fp4_bounds
from ...reference.layouts import from_linear
from ...reference.quantize import Quantized, quantize_per_token
from ...reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from ...reference.weights.experts import prepare_experts
from ..calls import Answered, Call, QuantizerCall
from ..edge_calls import ActivationCall
from ..kernel_calls import CALLS, rows_at_edges
from .answers import Kept
from .trial import Probe

Tensor = torch.Tensor


def _same(got: Any, want: Any) -> bool:
    return Kept(lambda: iter([("", want)])).right == Kept(lambda: iter([("", got)])).right


@dataclass(frozen=True)
class ReloadCall:
    """Weights written into prepared experts, which must be those prepared anew."""

    kind: ActivationType
    recipe: Recipe
    dtype: torch.dtype = torch.bfloat16
    static: bool = False

    def _experts(self, seed: int) -> tuple[Any, tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        rows = 80 * (2 if self.kind.gated else 1)
        w13 = host.normal(g, 2, rows, 144) * host.powers(host.arange(2) * 3)[:, None, None]
        w2 = host.normal(g, 2, 144, 80)
        w13[0, :, :16], w2[1] = 0, 0
        w = w13.to(self.dtype), w2.to(self.dtype)
        return prepare_experts(*w, self.kind, recipe=self.recipe, **self._options()), w

    def _options(self) -> dict[str, float]:
        return {"input_amax": 3.0, "intermediate_amax": 5.0} if self.static else {}

    def answer(self, device: str = "cpu") -> Any:
        from ...cases.moe_case import to_device

        experts = to_device(self._experts(0)[0], device)
        w13, w2 = (w.to(device) for w in self._experts(1)[1])
        experts.load_(w13, w2, recipe=self.recipe, backend="triton", **self._options())
        return to_device(experts, "cpu")

    def judge(self) -> Answered:
        want = self._experts(1)[0]
        nothing = host.zeros(1).double()
        return Answered(lambda got: _same(got, want), lambda got: nothing, nothing)


@dataclass(frozen=True)
class ProducerCall:
    """SiLU-and-mul, or an RMSNorm, with the quantizer behind it: every bit."""

    kind: int
    recipe: Recipe
    layout: SfLayout
    dtype: torch.dtype = torch.bfloat16
    fused: bool | None = None

    def _given(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        g = torch.Generator().manual_seed(3)
        x = host.normal(g, 9, 80) * host.powers(host.integers(g, -9, 7, (9, 1)))
        x[1], x[2, ::5] = 0, -0.0
        x[4] *= 2.0**-120 if self.dtype == torch.bfloat16 else 2.0**-10
        x[5] *= 8
        if self.kind == producer_launch.k.SILU_AND_MUL.value:
            return torch.cat((x, x.flip(0)), 1).to(self.dtype), None, None
        residual = None
        if self.kind == producer_launch.k.ADD_RMSNORM.value:
            residual = (x.flip(1) / 3).to(self.dtype)
        return x.to(self.dtype), host.normal(g, 80).to(self.dtype), residual

    def answer(self, device: str = "cpu") -> Any:
        x, weight, residual = (None if t is None else t.to(device) for t in self._given())
        assert x is not None
        got = producer_launch._produce(
            x, 80, self.kind, residual, weight, 1e-5, self.recipe.base_scale_inv, self.recipe,
            self.layout, self.fused,
        )  # fmt: skip
        return [t.cpu() for t in (*got, *([] if residual is None else [residual]))]

    def judge(self) -> Answered:
        x, weight, residual = self._given()
        if weight is None:
            values = producers.silu_and_mul(x)
        elif residual is None:
            values = producers.rmsnorm(x, weight, 1e-5)
        else:
            values, residual = producers.add_rmsnorm(x, residual, weight, 1e-5)
        q: Quantized = quantize_per_token(
            values, self.recipe.base_scale_inv, self.recipe, self.layout
        )
        assert q.per_token_scale is not None
        want = [
            q.codes,
            q.block_scales,
            q.per_token_scale,
            *([] if residual is None else [residual]),
        ]
        nothing = host.zeros(1).double()
        return Answered(lambda got: _same(list(got), want), lambda got: nothing, nothing)


@dataclass(frozen=True)
class DenseCall:
    """[M, K] times [N, K] transposed, of ragged sizes, judged by intervals and where exact by bits."""

    config: GemmConfig
    use_8x4: bool = False
    by_row: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    exact: bool = False
    m: int = 19
    k: int = 208

    def _given(self) -> tuple[tuple[Tensor, ...], Tensor]:
        g = torch.Generator().manual_seed(self.m)
        mask = 0xAA if self.exact else 0xFF
        a, b = (
            host.integers(g, 0, 256, (n, self.k // 2)).to(torch.uint8) & mask for n in (self.m, 136)
        )
        high = 0x38 if self.exact else 0x3A
        sa, sb = (
            host.integers(g, high if self.exact else 1, high + 1, (n, self.k // 16)).to(torch.uint8)
            for n in (self.m, 136)
        )
        a_scales = from_linear(sa, dense.a_layout(self.use_8x4))
        alpha = 0.3 + host.arange(self.m if self.by_row else 1).float()
        return (a, b, a_scales, from_linear(sb, SfLayout.layout_128x4)), alpha

    def answer(self, device: str = "cpu") -> Tensor:
        (a, b, sa, sb), alpha = self._given()
        a, b, sa, sb, alpha = (t.to(device) for t in (a, b, sa, sb, alpha))
        out = torch.empty(self.m, b.shape[0], dtype=self.out_dtype, device=device)
        triton_dense._mm_fp4(a, b, sa, sb, alpha, out, self.use_8x4, self.config)
        return out.cpu()

    def judge(self) -> Answered:
        (a, b, sa, sb), alpha = self._given()
        want = dense.mm_fp4(a, b.T, sa, sb.T, alpha, self.out_dtype, use_8x4_sf_layout=self.use_8x4)
        bounds = mm_fp4_bounds(
            a, b.T, sa, sb.T, alpha, self.out_dtype, use_8x4_sf_layout=self.use_8x4
        )

        def accepts(got: Tensor) -> bool:
            wrong = unequal(got, want) if self.exact else ~bounds.contains(got)
            return not wrong.any()

        return Answered(accepts, torch.Tensor.double, want.double())


def _more_quantizers() -> Iterator[tuple[str, Callable[[], Call]]]:
    far = rows_at_edges().float()
    far[:, 16:] *= 2.0 ** -(host.arange(64).float() / 3)
    near = rows_at_edges().float() * 2.0**-118
    half = matrix_edges.half_rows()
    recipes = {
        "cute-dsl, fast": Recipe(build="cute-dsl"),
        "cute-dsl, exact": Recipe("exact", build="cute-dsl"),
        "exact": Recipe("exact"),
        "4over6 of 256 by MSE, exact": Recipe("exact", NVFP44Over6Config(256, "MSE")),
        "4over6, fast error, cute-dsl": Recipe(
            "fast", NVFP44Over6Config(448, "MAE", True), "cute-dsl"
        ),
        "fast": Recipe(),
    }
    for name, recipe in recipes.items():
        for kind, x in (("far", far.bfloat16()), ("tiny", near.bfloat16()), ("fp16", half)):
            for case in matrix.cases(x, [recipe], False)[-2:]:
                yield (
                    f"quantizer, {name}, {case.mode}, {kind}",
                    functools.partial(QuantizerCall, x, case),
                )


def _more_activations() -> Iterator[tuple[str, Callable[[], Call]]]:
    for case in matrix_edges.activations(Recipe()):
        yield case.name, functools.partial(ActivationCall, case)


def _more() -> Iterator[tuple[str, Callable[[], Call]]]:
    yield from _more_quantizers()
    yield from _more_activations()
    small, wide = GemmConfig(128, 16, 128, 1, 4), GemmConfig(128, 32, 64, 2, 4)
    yield "dense", lambda: DenseCall(small)
    yield "dense, 8x4 by row", lambda: DenseCall(wide, use_8x4=True, by_row=True, m=41)
    yield "dense, exact, fp16", lambda: DenseCall(small, exact=True, out_dtype=torch.float16, k=256)
    yield "dense, decoded", lambda: DenseCall(GemmConfig(128, 32, 64, 1, 4, decoded=True), m=40)
    for kind in (ActivationType.Swiglu, ActivationType.Relu2):
        for recipe in (Recipe("exact"), Recipe()):
            yield f"reload, {kind.name}, {recipe}", lambda k=kind, r=recipe: ReloadCall(k, r)
    yield (
        "reload, static, fp16",
        lambda: ReloadCall(ActivationType.Situ, Recipe("exact"), torch.float16, True),
    )
    for i, name in enumerate(("silu", "rmsnorm", "add_rmsnorm")):
        layout = SfLayout((i + 1) % 3)
        yield f"{name}", lambda i=i, l=layout: ProducerCall(i, Recipe(), l)  # noqa: E741
        yield (
            f"{name}, fp16",
            lambda i=i: ProducerCall(i, Recipe("exact"), SfLayout.layout_128x4, torch.float16),
        )


_MORE: dict[str, Callable[[], Call]] = dict(_more())
_QUANTIZERS = (
    "quantizer, fast, 128x4", "quantizer, exact, 8x4", "quantizer, 4over6",
    "quantizer, saturating", "quantizer, fp32", *(n for n in _MORE if n.startswith("quantizer")),
)  # fmt: skip
_ACTIVATIONS = tuple(n for n in _MORE if "activation alone" in n)
_TILES = ("qwen", "top 1", "deepseek", "tiles of 16", "tiles of 32", "K of 1 1/2 tiles", "decoded")
_DENSE = tuple(n for n in _MORE if n.startswith("dense"))
_RELOAD = tuple(n for n in _MORE if n.startswith("reload"))
_PRODUCERS = ("silu", "silu, fp16", "rmsnorm", "rmsnorm, fp16", "add_rmsnorm", "add_rmsnorm, fp16")
_BLOCKS = (*_QUANTIZERS, "qwen", "4over6", *_PRODUCERS, *_RELOAD)
_LIBRARY = (*_QUANTIZERS, "far below", "qwen", "decoded", "bf16", "grid")
OF_FILE: dict[str, tuple[str, ...]] = {
    "kernels/jit/mma.py": ("qwen", "far below", *_DENSE, *_TILES[1:], "cancelling sums", "grid"),
    "kernels/moe_gemm.py": (*_ACTIVATIONS, "gpt-oss", "Swiglu, static", *_TILES, "bf16"),
    "kernels/moe_kernels.py": (
        *_TILES,
        "three launches",
        "cancelling",
        "any size, to fp32",
        "far rows",
    ),
    "kernels/routing.py": ("every routing method", "undecided routers", "saturated routers"),
    "kernels/quantize_kernel.py": _BLOCKS,
    "kernels/quantize_block.py": _BLOCKS,
    "kernels/jit/formats.py": _BLOCKS,
    "kernels/jit/load.py": _BLOCKS,
    "kernels/jit/store.py": _BLOCKS,
    "kernels/jit/arithmetic.py": _LIBRARY,
    "kernels/jit/decode.py": _LIBRARY,
    "kernels/jit/e2m1.py": _LIBRARY,
    "kernels/jit/e4m3.py": _LIBRARY,
    "kernels/jit/layouts.py": (*_LIBRARY, *_DENSE),
    "kernels/jit/pdl.py": _LIBRARY,
    "kernels/dense_gemm.py": _DENSE,
    "kernels/producer_kernel.py": _PRODUCERS,
    "kernels/reload_kernel.py": _RELOAD,
}
"""Calls of each module, in order."""


@functools.cache
def probe(name: str, device: str) -> Probe:
    call = (_MORE | CALLS)[name]()
    answered = call.judge()

    def run() -> Iterator[str]:
        if not answered.accepts(call.answer(device)):
            yield name

    return run
