"""A program that runs masked input whose rows beyond `masked_m` lie at addresses that do not exist.

It prints the name of each part that returned. A read at such an address ends it with SIGSEGV; with the
argument "read" it does that.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import mmap
import os
import sys

import masked_cases
import moe_cases
import quick_interpreter
import torch
from mutants.generated.strict import strict

from nvfp4_moe import fused_moe_masked, nvfp4_quantize_masked

MASKED = torch.tensor([8, 0, 16])
MOST, HIDDEN = 16, 8192  # eight rows of block scales are a page of 4,096 bytes
_MAPS = []
_MPROTECT = ctypes.CDLL(None, use_errno=True).mprotect


def without_the_rest(x: torch.Tensor) -> torch.Tensor:
    """A copy of [E, max_m, ...] whose rows beyond MASKED cannot be read."""
    memory = mmap.mmap(-1, x.nbytes)
    _MAPS.append(memory)
    out = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)
    out.copy_(x)
    row = x[0, 0].nbytes
    for e, m in enumerate(MASKED.tolist()):
        start, size = out.data_ptr() + (e * MOST + m) * row, (MOST - m) * row
        assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        if size:
            protected = _MPROTECT(ctypes.c_void_p(start), ctypes.c_size_t(size), 0)
            assert protected == 0, os.strerror(ctypes.get_errno())
    return out


def main() -> None:
    quick_interpreter.install()
    case = moe_cases.make(moe_cases.Shape(24, HIDDEN, 64, 3, 1))
    parts = (case.x, case.activations.hidden_states, case.activations.block_scales)
    x, codes, scales = (without_the_rest(masked_cases.spread(t, MASKED, MOST)) for t in parts)
    if sys.argv[1:] == ["read"]:
        x[0, 8].sum()
    token = masked_cases.spread(case.activations.per_token_scale, MASKED, MOST)
    options = {"backend": "triton"}
    with strict():  # the interpreter itself does not copy what kernels are given
        nvfp4_quantize_masked(x, MASKED, 1 / 2688, per_token_activation=True, **options)
        nvfp4_quantize_masked(x, MASKED, torch.tensor([1.0, 2.0, 3.0]), **options)
        print("quantizer")
        for activation in ("per-token", "bf16"):
            fused_moe_masked(x, MASKED, case.experts, activation=activation, **options)
        print("bf16")
        fused_moe_masked(
            codes, MASKED, case.experts, hidden_states_scale=scales, per_token_scale=token,
            **options,
        )  # fmt: skip
        print("codes")


if __name__ == "__main__":
    main()
