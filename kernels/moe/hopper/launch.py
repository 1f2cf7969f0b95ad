"""Launch the GEMMs for sm_90: TMA descriptors, and the programs that stay."""

# SPDX-License-Identifier: Apache-2.0
import functools
from dataclasses import dataclass

import torch

from ....reference.weights.experts import Experts
from ...launcher import cdiv, launch, next_power_of_2
from ...triton_target import arch, launch_options
from ..activation import NONE
from ..permute import Permutation
from .config import WIDEST_SHARED, RingConfig
from .dense_gemm import clear_kernel, dense_gemm_kernel
from .fragments import ROWS, WORDS
from .gluon import TensorDescriptor, gl
from .grouped_gemm import expert_gemm_kernel

_ROWS, _WORDS = ROWS.value, WORDS.value


@dataclass(frozen=True)
class _Memory:
    """The part of a tensor that a descriptor needs; it keeps no tensor alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=1024)
def _descriptor(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> TensorDescriptor:
    """Describe a contiguous tensor; nothing but the arguments counts."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    layout = gl.NVMMASharedLayout(swizzle, dtype.itemsize * 8, rank=len(shape))
    found = TensorDescriptor(_Memory(address, dtype), list(shape), strides, list(box), layout)
    found.kind = dtype, box, swizzle  # for `launcher.py`, as `at` is
    found.at = lambda address: _descriptor(address, dtype, shape, box, swizzle)
    return found


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _operands(
    values: torch.Tensor, w: torch.Tensor, w_sf: torch.Tensor, rows: int, k: int, config: RingConfig
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Describe tokens, codes and block scales: `rows` of weights in all, K a multiple of 64."""
    box, words = (config.box, 64), (rows, k // 8)
    tiled = (cdiv(rows, _ROWS), k // 64, 128)
    return (
        _descriptor(values.data_ptr(), values.dtype, tuple(values.shape), box, 128),
        _descriptor(w.data_ptr(), torch.int32, words, (config.rows, _WORDS), 64),
        _descriptor(w_sf.data_ptr(), torch.int32, tiled, (1, 2, 128), 0),
    )


def expert_gemm(
    values: torch.Tensor,
    token_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_sf: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    out: torch.Tensor,
    p: Permutation,
    config: RingConfig,
    experts: Experts | None,
    *,
    top_k: int = 0,
    fragments: bool = False,
) -> None:
    """Multiply rows by their experts' weights.

    Args:
        values: [rows, K rounded up to 128] bf16 in the order of `jit/fragments.py`, zeros beyond K.
        top_k: `values` has a row for each token, which has as many slots; 0: one for each permuted row.
        token_scale: [rows] fp32, or None.
        experts: of the first GEMM, whose activation is applied; None: of the second.
        fragments: write the columns of `out` in that order too, with zeros up to a multiple of 128.
    """
    local, m, k = w.shape[0], w.shape[1], w.shape[2] * 2
    strips = m // _ROWS
    # A gated strip has 64 results: an odd number of strips leaves half of 128 columns.
    odd = fragments and experts is not None and experts.activation.gated and strips % 2 == 1
    programs = min(p.tiles.shape[0] * strips, config.programs * multiprocessors(w.device))
    launch(expert_gemm_kernel, (programs,),
        *_operands(values, w, w_sf, local * m, k, config), values, token_scale, bias, scale,
        experts.output1_scale_gate_scalar if experts else None,
        experts.gemm1_alpha if experts else None,
        experts.gemm1_beta if experts else None,
        experts.gemm1_clamp_limit if experts else None,
        out, p.expanded, p.tiles, p.expanded.numel(), top_k, strips, m, k,
        GATHERED=top_k > 0, ACT=int(experts.activation) if experts else NONE.value,
        FRAGMENTS=fragments, ODD=odd, WIDTHS=config.widths,
        STAGES=config.stages, GROUPS=config.groups, AHEAD=config.ahead,
        ARCH=arch(w.device), num_warps=config.warps, maxnreg=config.registers,
        **launch_options(w.device),
    )  # fmt: skip


def dense_gemm(
    values: torch.Tensor,
    w: torch.Tensor,
    w_sf: torch.Tensor,
    alpha: torch.Tensor | None,
    out: torch.Tensor,
    config: RingConfig,
    *,
    by_row: bool,
) -> None:
    """Multiply rows by weights whose rows are in natural order: `out` [M, N], bf16 or fp16.

    Args:
        values: [M, K rounded up to 128] bf16 in the order of `jit/fragments.py`, zeros beyond K.
        w: codes [N, K/2] uint8 at a multiple of 16 bytes; 64 divides K.
        w_sf: their block scales in 128x4.
        alpha: fp32 [1], with `by_row` [M]; or None.
    """
    (m, n), k = out.shape, w.shape[1] * 2
    tiles = cdiv(n, config.rows) * cdiv(m, config.bn)
    programs = min(tiles, config.programs * multiprocessors(w.device))
    sums = ready = None
    if tiles % programs and config.bn <= WIDEST_SHARED:
        sums = values.new_empty((programs, config.rows * config.bn), dtype=torch.float32)
        ready = values.new_empty(programs, dtype=torch.int32)
        launch(clear_kernel, (1,), ready, programs,
            SIZE=next_power_of_2(programs), ARCH=arch(w.device), **launch_options(w.device),
        )  # fmt: skip
    launch(dense_gemm_kernel, (programs,),
        *_operands(values, w, w_sf, n, k, config), alpha, out, sums, ready, m, n, k,
        BY_ROW=by_row, WIDTHS=config.widths, STAGES=config.stages, GROUPS=config.groups,
        ARCH=arch(w.device), num_warps=config.warps, maxnreg=config.registers,
        **launch_options(w.device),
    )  # fmt: skip
