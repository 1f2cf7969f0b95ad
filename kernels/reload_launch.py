"""The Triton writer of `Experts.load_`: how its kernels are launched.

A maximum that is not given is one launch more, and one more read of the weights. Temporary memory is
8 bytes an expert. Nothing waits for the GPU.
"""

# SPDX-License-Identifier: Apache-2.0
import torch
import triton

from ..reference.fp32 import rcp_delta
from ..reference.recipe import BLOCK_SIZE, Recipe
from ..reference.reload import Target
from . import reload_kernel as k
from .quantize import _DTYPES
from .target import INTERPRETING, arch, launch_options


def write(
    w: torch.Tensor, amax: torch.Tensor | None, recipe: Recipe, target: Target
) -> torch.Tensor:
    """A `reference.reload.Writer`."""
    decode = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    if w.is_contiguous() and w.data_ptr() % 16 == 0:
        _write(w, amax, recipe, target, decode)
        return decode
    for e in range(w.shape[0]):  # a copy of one expert at a time
        one = slice(e, e + 1)
        part = Target(target.codes[one], target.block_scales[one], target.gated)
        _write(
            w[one].clone(memory_format=torch.contiguous_format),
            None if amax is None else amax[one],
            recipe,
            part,
            decode[one],
        )
    return decode


def _write(
    w: torch.Tensor,
    amax: torch.Tensor | None,
    recipe: Recipe,
    target: Target,
    decode: torch.Tensor,
) -> None:
    n, rows, columns = w.shape
    blocks = columns // BLOCK_SIZE
    words = w.view(torch.int32)
    options = {
        "DTYPE": _DTYPES[w.dtype].value,
        "ARCH": arch(w.device),
        **launch_options(w.device),
    }
    size = rows * columns // 2
    if amax is None:
        found = torch.zeros(n, dtype=torch.int32, device=w.device)
        step, steps = (4096, 4) if not INTERPRETING else (1 << 15, 4)
        k.amax_kernel[(triton.cdiv(size, step * steps), n)](
            words, found, size, WORDS=step, STEPS=steps, num_warps=8, **options
        )
        amax = found.view(torch.float32)
    at_once = 256 if not INTERPRETING else 2048
    k.load_weights_kernel[(triton.cdiv(rows * blocks, at_once), n)](
        words,
        amax.contiguous(),
        rcp_delta(w.device) if INTERPRETING else None,
        target.codes.view(torch.int32),
        target.block_scales.view(torch.uint8),
        decode,
        6.0 * recipe.e4m3_max,
        rows,
        rows // 2 if target.gated else rows,
        blocks,
        target.codes.shape[1],
        target.block_scales.shape[2],
        RECIPE=recipe.code,
        GATED=target.gated,
        BLOCKS=at_once,
        num_warps=4,
        **options,
    )
