"""Numbers at the edges of fp32, and seeds."""

# SPDX-License-Identifier: Apache-2.0
import functools

import torch

from nvfp4_moe import host


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def specials() -> torch.Tensor:
    """fp32: zeros, subnormals, the ends of every range, infinities, NaN; both signs."""
    tiny, big = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    some = [0.0, 1e-45, tiny / 2, tiny, tiny * 1.5, 2.0**-100, 1.0, 3.0, 2.0**100, 2.0**126, 2.0**127,
            big, torch.inf, torch.nan]  # fmt: skip
    x = host.fp32(some)
    near = torch.nextafter(x, host.full(x.shape, torch.inf))
    every = torch.cat([x, near, torch.nextafter(x, host.zeros(*x.shape))])
    return torch.cat([every, -every])


def around(values: torch.Tensor) -> torch.Tensor:
    """Numbers and their fp32 neighbours, both signs."""
    up = torch.nextafter(values, host.full(values.shape, torch.inf))
    down = torch.nextafter(values, host.full(values.shape, -torch.inf))
    every = torch.cat([values, up, down])
    return torch.cat([every, -every, specials()])
