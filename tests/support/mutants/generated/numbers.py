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


@functools.cache
def factors_of_the_least() -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 factors, both signs of the first: products 2^-126 (1 - d), d from 2^-34 to 2^-22.

    One d is 2^-25, of which a GPU makes 2^-126 and not 0; one is 2^-24.
    """
    step = host.arange(64, 4096, 16).float() * 2.0**-23  # d is its square
    a = torch.cat([1 + step, host.fp32([31 / 32, 1.0])])
    b = torch.cat([1 - step, host.fp32([1082401 * 2.0**-20, 1 - 2.0**-24])])
    return torch.cat([a, -a]) * 2.0**-60, b.repeat(2) * 2.0**-66
