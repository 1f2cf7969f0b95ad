"""Rows, experts and columns whose first element is 2^31 or more behind the first of all.

Only the last programs run, in the interpreter, on memory of which no other page is touched. Their
answers are those of the same rows alone, which other calls judge.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nvfp4_moe import host
from nvfp4_moe.kernels.decode import decode
from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.call import KernelCall as DenseKernelCall
from nvfp4_moe.kernels.fused_quantize import launch as fused_quantize_launch
from nvfp4_moe.kernels.fused_quantize.call import KernelCall as FusedKernelCall
from nvfp4_moe.kernels.moe import launch, routing
from nvfp4_moe.kernels.moe.finalize import finalize
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.masked.rows import copy_rows
from nvfp4_moe.kernels.moe.permute import Permutation
from nvfp4_moe.kernels.quantize import kernel as k
from nvfp4_moe.kernels.quantize import launch as quantize_launch
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.weights import launch as weights_launch
from nvfp4_moe.reference.layouts import padded_shape
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import Recipe, SfLayout
from nvfp4_moe.reference.weights.update import Job

from ..calls import Answered
from .part_calls import exactly
from .strict import strict

Tensor = torch.Tensor
FAR = 2**31
_TILE = GemmConfig(128, 16, 64, 1, 4)
_NUMPY = {
    torch.bfloat16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.float32: np.float32,
}


def empty(dtype: torch.dtype, *size: int) -> Tensor:
    """Zeros, of which no page takes memory before it is touched."""
    return torch.from_numpy(np.zeros(size, _NUMPY[dtype])).view(dtype)


def behind(last: Tensor, count: int) -> Tensor:
    """[count, ...] whose last elements are these."""
    whole = empty(last.dtype, count, *last.shape[1:])
    whole[count - len(last) :] = last
    return whole


@dataclass(frozen=True)
class FarCall:
    """A call whose `ask(n)` returns the last few of n rows."""

    ask: Callable[[int], Any]
    near: int
    far: int
    programs: int = 16

    def answer(self, device: str = "cpu") -> Any:
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            return self._asked(self.far)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True

    def _asked(self, rows: int) -> Any:
        with strict(self.programs):
            return self.ask(rows)

    def judge(self) -> Answered:
        return exactly(self._asked(self.near))


def some_bytes(seed: int, *size: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return host.integers(g, 0, 127, size).to(torch.uint8)


def some_values(*size: int) -> Tensor:
    return host.normal(torch.Generator().manual_seed(size[0]), *size).bfloat16()


def _decode(rows: int) -> Tensor:
    codes, scales = behind(some_bytes(1, 2, 32), rows), behind(some_bytes(2, 2, 4), rows)
    return decode(codes, scales, SfLayout.layout_linear)[-2:]


def _decode_weights(rows: int) -> Tensor:
    codes, scales = behind(some_bytes(3, 128, 32), rows), behind(some_bytes(4, 128, 4), rows)
    return decode(codes, scales, SfLayout.layout_128x4, operand=True)[-128:]


def _finalize(tokens: int) -> Tensor:
    out = torch.empty(tokens, 64, dtype=torch.bfloat16, device="cpu")
    permuted = behind(host.arange(4)[:, None].int(), tokens)
    weights = behind(some_values(4, 1), tokens)
    finalize(some_values(9, 64), permuted.view(-1), weights, out, "slot")
    return out[-4:]


def _copied(rows: int) -> Tensor:
    x, index = behind(some_values(4, 64), rows), behind(host.arange(rows - 4, rows).int(), rows)
    return copy_rows(x, index)[-4:]


def _in_fragments(rows: int) -> Tensor:
    x = behind(some_values(4, 16384), rows)
    return in_fragments(x, host.arange(rows).int()[:, None])[-4:]


def _route(tokens: int) -> Any:
    found = routing.route(behind(some_values(4, 64), tokens), Routing(RoutingMethodType.TopK, 1))
    return [t[-4:] for t in found]


def _quantize(rows: int) -> Any:
    x = behind(some_values(4, 64), rows)
    q = quantize_launch.quantize_per_token(x, 1 / 2688, Recipe(), SfLayout.layout_linear)
    return [t[-4:] for t in q]


def _quantize_chosen(rows: int) -> Any:
    x, index = behind(some_values(4, 64), rows), behind(host.arange(rows - 4, rows).int(), rows)
    codes, scales = empty(torch.uint8, rows, 32), empty(torch.uint8, rows, 4)
    out = quantize_launch.Outputs(codes, scales, empty(torch.float32, rows))
    mode, linear = k.PER_TOKEN.value, int(SfLayout.layout_linear)
    quantize_launch._launch(x, out, mode, None, 1 / 2688, Recipe().code, linear, row_index=index)
    return [t[-4:] for t in out[:3] if t is not None]


def _quantize_to_values(rows: int) -> Any:
    values, scale = quantize_launch.quantize_to_values(
        behind(some_values(4, 64), rows), Recipe(), per_token=True
    )
    assert scale is not None
    return values[-4:], scale[-4:]


def _padding(rows: int) -> Tensor:
    """The programs that fill padding read no row: there are none."""
    layout = SfLayout.layout_128x4
    padded_rows, columns = padded_shape(rows, 8, layout)
    sf = behind(torch.full((128, columns), 7, dtype=torch.uint8, device="cpu"), padded_rows)
    nothing = torch.zeros(1, dtype=torch.int32, device="cpu")
    k.quantize_kernel[(-(-rows // 64) + 1, 1)](
        nothing, None, None, None, nothing, nothing, sf, None, None, nothing.float(), 1.0, rows, 8,
        padded_rows, columns, RECIPE=Recipe().code, MODE=0, DTYPE=0, LAYOUT=int(layout),
        INVERSE=False, HAS_ROW_INDEX=False, HAS_SCALE_TENSOR=False, HAS_OUT_SCALE=False, ROWS=64,
        BLOCKS=8, PARTS=1, READ=0, SPLITS=1, FRAGMENTS=False, SLOTS=0, ARCH=0,
    )  # fmt: skip
    return sf[-128:]


def _silu(rows: int) -> Any:
    x = behind(some_values(4, 128), rows)
    call = FusedKernelCall(x, None, 0.0, 1 / 2688, Recipe(), SfLayout.layout_linear)
    found = fused_quantize_launch.fused_quantize(call, None)
    return [t[-4:] for t in found]


def _added(rows: int, fused: bool | None = None) -> Any:
    x, residual = (behind(some_values(n, 64)[-4:], rows) for n in (4, 5))
    call = FusedKernelCall(x, some_values(64), 0.0, 1 / 2688, Recipe(), SfLayout.layout_linear)
    found = fused_quantize_launch.fused_quantize(call, residual, fused)
    return [t[-4:] for t in (residual, *found)]


def _reloaded(experts: int) -> Any:
    w = behind(some_values(2, 128, 64), experts)
    bits = empty(torch.int32, experts)
    weights_launch._launch_amax(w, bits)
    codes, scales = empty(torch.uint8, experts, 128, 32), empty(torch.uint8, experts, 128, 4)
    scalar = empty(torch.float32, experts)
    job = Job(
        w, None, False, codes, scales.view(torch.float8_e4m3fn), None, scalar, None, None, None
    )
    weights_launch._launch_quantize(job, bits.view(torch.float32), Recipe())
    return [t[-2:] for t in (bits, codes, scales, scalar)]


def _dense(m: int, n: int) -> Any:
    rows = min(m, 128), min(n, 128)
    a, b = behind(some_bytes(5, rows[0], 32), m), behind(some_bytes(6, rows[1], 32), n)
    sa, sb = (behind(some_bytes(7, 128, 4), -(-count // 128) * 128) for count in (m, n))
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cpu")
    dense_launch.mm_fp4(DenseKernelCall(a, b, sa, sb, None, use_8x4=False), out, _TILE)
    return out[-rows[0] :, -rows[1] :]


def _experts_of(far: int) -> Any:
    """A tile of 5 rows: token, expert and permuted row are far; K is 64."""
    experts, tokens, row = (1, 8, 0) if far == 0 else (2**20 + 1, 2**25 + 8, 2**24)
    w, sf = behind(some_bytes(8, 1, 128, 32), experts), behind(some_bytes(9, 1, 128, 4), experts)
    x = behind(some_values(8, 4, 16), tokens)
    chosen = host.arange(tokens - 5, tokens).int()
    bias, scale = behind(host.ones(1, 128), experts), behind(host.ones(1) / 3, experts)
    tile = torch.tensor([[experts - 1, row, 5, 1]], dtype=torch.int32, device="cpu")
    out = torch.empty(row + 5, 128, dtype=torch.bfloat16, device="cpu")
    expanded = behind(chosen, row + 5)
    launch._launch_gemm(
        launch.Operand(x, None, None), w, sf, bias, scale, out,
        Permutation(expanded, expanded, tile, expanded), _TILE, 1, None, SimpleNamespace(),
    )  # fmt: skip
    return out[-5:]


def calls() -> Iterator[tuple[str, Callable[[], FarCall]]]:
    """By name; the far call of each is in the interpreter alone."""
    k64 = FAR // 64
    yield "far, decode", lambda: FarCall(_decode, 2, k64 + 2, 1)
    yield "far, decode weights", lambda: FarCall(_decode_weights, 128, k64 + 128)
    yield "far, finalize", lambda: FarCall(_finalize, 4, k64 + 4, 4)
    yield "far, copied rows", lambda: FarCall(_copied, 4, k64 + 4, 4)
    yield "far, fragments", lambda: FarCall(_in_fragments, 4, FAR // 16384 + 4)
    yield "far, route", lambda: FarCall(_route, 4, k64 + 4, 4)
    yield "far, quantize", lambda: FarCall(_quantize, 4, 2 * k64 + 4, 1)
    yield "far, quantize chosen rows", lambda: FarCall(_quantize_chosen, 4, 2 * k64 + 4, 1)
    yield "far, quantize to values", lambda: FarCall(_quantize_to_values, 4, k64 + 4, 1)
    yield "far, padding", lambda: FarCall(_padding, 5, FAR // 2 + 5, 1)
    yield "far, silu", lambda: FarCall(_silu, 4, k64 + 4, 1)
    yield "far, add_rmsnorm", lambda: FarCall(_added, 4, 2 * k64 + 4, 1)
    yield (
        "far, add_rmsnorm in two launches",
        lambda: FarCall(lambda n: _added(n, False), 4, k64 + 4, 1),
    )
    yield "far, reload", lambda: FarCall(_reloaded, 2, FAR // 4096 + 2)
    yield "far, dense rows", lambda: FarCall(lambda m: _dense(m, 64), 128, k64 + 128)
    yield "far, dense columns", lambda: FarCall(lambda n: _dense(3, n), 128, FAR // 16 + 128)
    yield "far, experts", lambda: FarCall(_experts_of, 0, 1)
