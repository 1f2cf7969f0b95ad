"""A mixture of experts to train through: the server's forward pass with a straight-through gradient."""

# SPDX-License-Identifier: Apache-2.0
from .layer import fake_quantized_moe

__all__ = ["fake_quantized_moe"]
