"""The gradient of one tensor, from autograd's graph but without autograd's engine.

The engine counts the machine's GPUs before its first pass, also over CPU tensors. That initializes CUDA
in the process that forks (`cuda_state.py`).
"""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from typing import Any

import torch

Tensor = torch.Tensor


@torch.no_grad()
def gradient(y: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the one leaf that `y` depends on, in the leaf's shape and dtype.

    Every node adds up what its users hand it, and then hands on what its own backward makes of the sum.

    Args:
        y: a result of operations on the leaf, of any shape.
        grad: the gradient of y, in the shape of y.

    Raises:
        ValueError: y depends on more than one leaf.
    """
    users = _users(y.grad_fn)
    given: dict[Any, dict[int, Tensor]] = {y.grad_fn: {y.output_nr: grad}}  # by node and output
    ready = [y.grad_fn]
    while True:
        node = ready.pop()
        outputs = given.pop(node)
        if node.name() == "torch::autograd::AccumulateGrad":  # a leaf
            if ready or given:
                raise ValueError("y depends on more than one leaf, and one is allowed")
            return outputs[0]
        backward = getattr(node, "apply", node)  # of a torch.autograd.Function, or of an operation
        found = backward(*(outputs.get(i) for i in range(max(outputs) + 1)))
        found = found if isinstance(found, tuple) else (found,)
        for (before, i), t in zip(node.next_functions, found, strict=True):
            if before is not None:
                sums = given.setdefault(before, {})
                sums[i] = sums[i] + t if i in sums else t
                users[before] -= 1
                if not users[before]:
                    ready.append(before)


def _users(last: Any) -> Counter[Any]:
    """Return how many edges lead to each node."""
    users: Counter[Any] = Counter()
    left, seen = [last], {last}
    while left:
        for before, _ in left.pop().next_functions:
            if before is not None:
                users[before] += 1
                if before not in seen:
                    seen.add(before)
                    left.append(before)
    return users
