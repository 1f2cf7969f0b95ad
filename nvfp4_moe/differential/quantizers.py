"""The sides of a comparison: what runs a case, here or in a child process."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..cases.quantize import Case
from ..console import progress
from ..kernels.quantize.api import QUANTIZE
from ..kernels.quantize.call import QuantizeCall, make_quantize_call
from ..reference.quantize import Quantized
from . import workers
from .compare import run_reference

Job = tuple[torch.Tensor, Case]
GOLDEN = "golden"
"""The side of FlashInfer's own outputs, which are fixed."""


def request(x: torch.Tensor, case: Case) -> QuantizeCall:
    """The case as the public call's request."""
    return make_quantize_call(
        x,
        case.scale(x),
        sfLayout=case.layout,
        per_token_activation=case.per_token,
        nvfp4_4over6=case.recipe.four_over_six,
        fast_math=case.recipe.math == "fast",
        build=case.recipe.build,
        flashinfer=case.recipe.flashinfer,
    )


def run(backend: str, x: torch.Tensor, case: Case) -> Quantized:
    """A backend's answer, on the CPU."""
    if backend == "reference":
        q = run_reference(x, case)
        outputs: Sequence[torch.Tensor | None] = (q.codes, q.block_scales, q.per_token_scale)
    else:
        outputs = QUANTIZE.run(backend, request(x, case))
    codes, scales, *token = (t.cpu() for t in outputs if t is not None)
    return Quantized(codes, scales, token[0] if token else None)


def refusal(backend: str, x: torch.Tensor, case: Case) -> str | None:
    """Return why a backend does not run the case; None if it does."""
    return QUANTIZE.refusal(backend, request(x, case))


def interpret(jobs: list[Job]) -> list[Quantized]:
    """The Triton kernels' answers from their interpreter."""
    with progress.bar("quantizers in Triton's interpreter", len(jobs)):
        return workers.call_interpreted(run, [("triton", x, case) for x, case in jobs])


def compile_ahead(jobs: list[Job]) -> None:
    """Compile the Triton kernels of the jobs for this GPU, side by side, into Triton's cache.

    One after the other, those of `nvfp4-moe diff` take a quarter of an hour. Cases that differ in the
    tensor alone can share a kernel, so they go to one process.
    """
    shapes: dict[Case, dict[tuple[torch.Size, torch.dtype], None]] = {}
    for x, case in jobs:
        kernel = replace(case, global_scale=case.global_scale and 1.0)
        shapes.setdefault(kernel, {})[x.shape, x.dtype] = None
    with progress.bar("compiling quantizers", len(shapes)):
        workers.call(_compile, [(list(of), case) for case, of in shapes.items()])


def _compile(shapes: list[tuple[torch.Size, torch.dtype]], case: Case) -> None:
    for shape, dtype in shapes:
        run("triton", torch.zeros(shape, dtype=dtype, device="cuda"), case)


Runner = Callable[[torch.Tensor, Case], Quantized]
