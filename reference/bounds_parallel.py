"""The earlier path of `bounds/parallel.py`, which the documentation of version 0.1 names."""

# SPDX-License-Identifier: Apache-2.0
from .bounds.parallel import all_reduce_bounds, expert_parallel_bounds, tensor_parallel_bounds

__all__ = ["all_reduce_bounds", "expert_parallel_bounds", "tensor_parallel_bounds"]
