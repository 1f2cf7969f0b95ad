"""Kernels of the backward pass of a trained layer, which `nvfp4_moe/training/` calls on a GPU.

`first_sums` has the first product of quantized tokens, and `activation_gradient` the activation with its
derivative. `row_dots` gives the gradient of the routing weights, and `empty_groups` the zeros of experts
without rows. `kernels/weights/values.py` decodes the weights for the products.
"""

# SPDX-License-Identifier: Apache-2.0
