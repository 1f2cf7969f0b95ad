"""The Triton writer of `Experts.load_`: how its kernels are launched.

Maxima that are not given are one launch more, and one more read of the weights. Temporary memory is
4 bytes an expert and GEMM. Nothing waits for the GPU.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...reference.numerics.fp32 import rcp_delta
from ...reference.recipe import BLOCK_SIZE, Recipe
from ...reference.weights.update import Job
from ..launcher import cdiv, launch
from ..quantize.launch import DTYPES
from ..triton_target import INTERPRETING, arch, launch_options
from . import kernel as k

_WORDS = 4096 if not INTERPRETING else 1 << 16
"""Words that a program reads at a time for a maximum."""
_BLOCKS = 256 if not INTERPRETING else 2048
"""Blocks that a program quantizes."""


def write(jobs: Sequence[Job], recipe: Recipe) -> None:
    """A `reference.weights.update.Writer`."""
    if all(job.w.is_contiguous() and job.w.data_ptr() % 16 == 0 for job in jobs):
        _write(jobs, recipe)
        return
    for job in jobs:
        _write_copied(job, recipe)


def _write_copied(job: Job, recipe: Recipe) -> None:
    """An expert at a time, its weights copied to where the kernels can read them."""
    copy = torch.empty_like(job.w[:1], memory_format=torch.contiguous_format)
    for e in range(job.w.shape[0]):
        some = slice(e, e + 1)
        one = replace(
            job,
            w=copy.copy_(job.w[some]),
            amax=None if job.amax is None else job.amax[some],
            codes=job.codes[some],
            block_scales=job.block_scales[some],
            added=None if job.added is None else job.added[some],
            scalar=job.scalar[some],
            up_scalar=None if job.up_scalar is None else job.up_scalar[some],
        )
        _write([one], recipe)


def _write(jobs: Sequence[Job], recipe: Recipe) -> None:
    device, n = jobs[0].w.device, jobs[0].w.shape[0]
    given = [job.amax for job in jobs]
    if any(amax is None for amax in given):
        found = torch.zeros((len(jobs), n), dtype=torch.int32, device=device)
        for job, bits in zip(jobs, found, strict=True):
            _launch_amax(job.w, bits)
        given = list(found.view(torch.float32))
    for job, amax in zip(jobs, given, strict=True):
        assert amax is not None
        _launch_quantize(job, amax.contiguous(), recipe)


def _options(w: torch.Tensor) -> dict[str, int]:
    return {"DTYPE": DTYPES[w.dtype].value, "ARCH": arch(w.device), **launch_options(w.device)}


def _launch_amax(w: torch.Tensor, bits: torch.Tensor) -> None:
    n, size = w.shape[0], w[0].numel() // 2
    programs = cdiv(size, _WORDS)
    # Longer programs where there are enough of them: fewer atomic operations.
    steps = 4 if programs * n >= 4096 else 1
    launch(
        k.amax_kernel,
        (cdiv(programs, steps), n),
        w.view(torch.int32),
        bits,
        size,
        WORDS=_WORDS,
        STEPS=steps,
        num_warps=8,
        **_options(w),
    )


def _zero_padding(job: Job) -> None:
    """Zero what `load_weights_kernel` leaves out. Rows are padded behind, and shuffled by 32."""
    rows, half = job.w.shape[1], job.w.shape[2] // 2
    if job.codes.shape[1:] != (rows, half):
        job.codes[:, rows // 32 * 32 :].zero_()
        job.codes[:, :, half:].zero_()
        job.block_scales.view(torch.uint8).zero_()


def _launch_quantize(job: Job, amax: torch.Tensor, recipe: Recipe) -> None:
    n, rows, columns = job.w.shape
    blocks = columns // BLOCK_SIZE
    _zero_padding(job)
    launch(
        k.load_weights_kernel,
        (cdiv(rows * blocks, _BLOCKS), n),
        job.w.view(torch.int32),
        amax,
        job.added,
        rcp_delta(job.w.device) if INTERPRETING else None,
        job.codes.view(torch.int32),
        job.block_scales.view(torch.uint8),
        job.scalar,
        job.divisor,
        job.up_scalar,
        job.factor,
        6.0 * recipe.e4m3_max,
        rows,
        rows // 2,
        blocks,
        job.codes.shape[1],
        job.block_scales.shape[2],
        RECIPE=recipe.code,
        GATED=job.gated,
        BLOCKS=_BLOCKS,
        num_warps=4,
        **_options(job.w),
    )
