"""The dense product in Triton: how its kernels are launched.

One launch decodes the rows of `a`, or reorders them where they are bf16, and a second multiplies. Where
the GPU multiplies codes there is one launch in all. On sm_90 the GEMM of `moe/hopper/` multiplies where
it serves (`hopper.py`), after a launch that clears flags if programs share tiles. Elsewhere a third
launch decodes `b`, if `a` has many rows. Nothing waits for the GPU, so a call can be captured in a CUDA
graph.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ...reference.dense import a_layout
from ...reference.recipe import BLOCK_SIZE, SfLayout
from ..allocate import aligned
from ..decode import decode, decode_to_fragments
from ..launcher import cdiv, launch
from ..moe.hopper.config import RingConfig
from ..tiles import GemmConfig
from ..triton_target import arch, launch_options, native_mma, shared_memory
from . import hopper
from .call import KernelCall
from .kernel import dense_gemm_kernel
from .ops import register

_WAVE = 128
"""Programs that keep a large GPU busy."""


def dense_config(
    m: int,
    n: int,
    k: int,
    arch: int,
    *,
    native: bool | None = None,
    batch_invariant: bool = False,
) -> GemmConfig:
    """The tiles of [m, k] times [k, n] on a GPU of this ARCH: `bm` of n, `bn` of m.

    The tiles are those that `moe.tile_table.gemm_config` chooses,
    measured on an H100 for as many tokens of one expert,
    narrower where too few programs would be left. On GPUs that multiply codes nothing was measured.
    The order of a sum depends on `bk` and `decoded`, so on m; with `batch_invariant` both are always the
    same.

    Args:
        native: the GPU multiplies codes; omitted, as it does for this ARCH. It cannot where `a` is bf16.
    """
    if native_mma(arch) if native is None else native:
        if m <= 16:
            return GemmConfig(128, 16, 128, 4, 4)
        return GemmConfig(128, 64, 128, 3, 4) if m <= 64 else GemmConfig(128, 128, 128, 3, 8)
    strips = cdiv(n, 128)
    if m <= 16:
        long = k >= 4096 and strips >= _WAVE and not batch_invariant
        return GemmConfig(128, 16, 256, 3, 4) if long else GemmConfig(64, 16, 128, 4, 4)
    if m <= 32:
        return GemmConfig(64, 32, 128, 4, 4)
    if m < 1024 or batch_invariant:
        if strips * cdiv(m, 64) < _WAVE:
            return GemmConfig(64, 64, 128, 4, 4)
        return GemmConfig(128, 64, 128, 3, 8, registers=128)
    if shared_memory(arch) < 160:
        return GemmConfig(128, 128, 64, 3, 8, decoded=True)
    return GemmConfig(256, 128, 64, 4, 8, decoded=True)


def mm_fp4(
    call: KernelCall, out: torch.Tensor, config: GemmConfig | RingConfig | None = None
) -> None:
    """Fill `out` [M, N] in Triton.

    Args:
        config: the tiles; None: `hopper.ring_config` on an sm_90 where it serves, else `dense_config`.
    """
    m, n, k, here = call.m, call.n, call.k, arch(call.a.device)
    if isinstance(config, RingConfig) or (config is None and hopper.refusal(here, k) is None):
        _in_gluon(call, out, config)
        return
    native = native_mma(here) and call.a_scales is not None
    config = config or dense_config(
        m, n, k, here, native=native, batch_invariant=call.batch_invariant
    )
    x, w, columns = aligned(call.a), aligned(call.b_rows), k
    x_sf = None if call.a_scales is None else aligned(call.a_scales)
    w_sf: torch.Tensor | None = aligned(call.b_scales)
    if config.decoded:
        columns = cdiv(k, config.bk) * config.bk
        layout = SfLayout.layout_128x4
        w, w_sf = decode(w, call.b_scales, layout, columns=columns, operand=True), None
    if call.a_scales is None:
        x = _fourths(x, columns)
    elif not native:
        x, x_sf = decode(x, call.a_scales, a_layout(call.use_8x4), columns=columns), None
    launch(dense_gemm_kernel, (cdiv(n, config.bm) * cdiv(m, config.bn),),
        x, x_sf, w, w_sf, call.alpha, out, m, n, columns // 4, cdiv(k, 4 * BLOCK_SIZE),
        BY_ROW=call.by_row, X_TILE=8 if call.use_8x4 else 128,
        BM=config.bm, BN=config.bn, BK=config.bk, STAGES=config.stages,
        EVEN=k % config.bk == 0, NATIVE=native, ARCH=here, num_warps=config.warps,
        maxnreg=config.registers, **launch_options(call.a.device),
    )  # fmt: skip


def _in_gluon(call: KernelCall, out: torch.Tensor, config: RingConfig | None) -> None:
    from ..moe.hopper.launch import dense_gemm, multiprocessors
    from ..moe.hopper.rows import in_fragments

    config = config or hopper.ring_config(call.m, call.n, multiprocessors(call.a.device))
    if call.a_scales is None:
        x = in_fragments(aligned(call.a))
    else:
        layout = a_layout(call.use_8x4)
        x, _ = decode_to_fragments(aligned(call.a), aligned(call.a_scales), None, layout)
    w, w_sf = aligned(call.b_rows), aligned(call.b_scales)
    dense_gemm(x, w, w_sf, call.alpha, out, config, by_row=call.by_row)


def _fourths(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return bf16 rows [M, K] as `decode` orders them, [M, 4, columns / 4], with zeros beyond K."""
    padded = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    return padded.unflatten(1, (-1, 4)).transpose(1, 2).contiguous()


OP = register("triton", mm_fp4)
