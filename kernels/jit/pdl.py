"""Programmatic dependent launch (from sm_90): a kernel starts while the one before it ends."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def await_previous(ARCH: tl.constexpr):
    """Wait until the writes of the previous kernels are visible (PTX griddepcontrol.wait)."""
    if ARCH >= 90:
        gdc_wait()
