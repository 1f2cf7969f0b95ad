"""Programmatic dependent launch: waiting for the kernels before."""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def await_previous(ARCH: tl.constexpr):
    """Wait until what the kernels before wrote is visible: this one may be here before they end."""
    if ARCH >= 90:
        gdc_wait()
