"""Every operation that sums, in fp64 and rounded: then a batch does not show in the bits of a model.

It is slow, and for a comparison alone. Outputs of modules that were hooked show whether it is so.
"""

# SPDX-License-Identifier: Apache-2.0
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .calls import Count, differing

SUMS = {
    functional.linear,
    functional.softmax,
    torch.matmul,
    torch.softmax,
    torch.Tensor.matmul,
    torch.Tensor.mean,
    torch.Tensor.softmax,
    torch.Tensor.sum,
    torch.Tensor.__matmul__,
}


class Float64(TorchFunctionMode):
    """Compute `SUMS` in fp64 and round them to the type that they had.

    The experts of this library are one operation here, which stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func not in SUMS or not torch.is_tensor(first) or not first.is_floating_point():
            return func(*args, **kwargs)
        dtype = kwargs.pop("dtype", None) or first.dtype
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
        )
        return func(*args, **kwargs).to(dtype)


@contextmanager
def outputs(model: torch.nn.Module, texts: int) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what each module but the experts gives, [texts, S, ...] a call.

    Args:
        model: of transformers.
        texts: sequences of a batch; modules that flatten them are unflattened.
    """
    found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(name: str, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if name.endswith("self_attn"):
            parts = parts[:1]  # the other are weights, by pairs of places
        for i, part in enumerate(parts):
            if torch.is_tensor(part):
                rows = part if part.dim() > 2 else part.unflatten(0, (texts, -1))
                found[f"{name}[{i}]"].append(rows.detach().clone())

    handles = [
        module.register_forward_hook(lambda m, a, output, name=name: hook(name, output))
        for name, module in model.named_modules()
        if name.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))
        and not isinstance(module, torch.nn.ModuleList)
        and not name.endswith(("experts", "act_fn"))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def compared(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> Count:
    """Count the outputs that differ, of places that both have.

    Raises:
        ValueError: another module ran in one of them.
    """
    if set(a) != set(b):
        raise ValueError(f"modules of one alone: {sorted(set(a) ^ set(b))}")
    total = Count(0, 0)
    for name in a:
        one, other = torch.cat(a[name], 1), torch.cat(b[name], 1)
        places = min(one.shape[1], other.shape[1])
        total += differing(one[:, -places:], other[:, -places:])
    return total
