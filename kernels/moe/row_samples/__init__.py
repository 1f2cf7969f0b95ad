"""Samples of the rows of a layer call, copied inside a CUDA graph for the canary.

`buffer` has the memory and the launch, `kernel` the kernel.
"""

# SPDX-License-Identifier: Apache-2.0
