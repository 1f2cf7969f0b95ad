"""Device functions that the Triton kernels share; none knows an operation.

Nothing here imports another part of `kernels/`.
"""

# SPDX-License-Identifier: Apache-2.0
