"""Routers whose logits are near each other, large, next to ties of bf16, or no numbers."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from nvfp4_moe import host
from nvfp4_moe.reference.moe.routing import METHODS, Routing, RoutingMethodType

from ..edge_calls import RoutingCall
from .numbers import seeded

Tensor = torch.Tensor


def _near() -> Tensor:
    """[6, 100]: scores that are equal, or apart by an ulp."""
    centers = host.fp32([0.0, 0.5, -1.5, 3.0, -9.0, 30.0])[:, None]
    return centers + host.uniform(seeded(1), 6, 100) * 2.0**-14 * centers.abs().clamp_min(0.1)


def _dense() -> Tensor:
    """[4, 256]: scores an ulp apart behind a larger one, in any order."""
    order = [torch.randperm(256, generator=seeded(row), device="cpu") for row in range(4)]
    x = torch.stack(order).float() * host.fp32([[2.0**-24], [3 * 2.0**-24]] * 2)
    x[:, 77] += host.fp32([0.25, 0.5, 0.75, 1.5])
    return x


def _large() -> Tensor:
    return host.normal(seeded(2), 4, 100) * 4 + host.fp32([[300.0], [-300.0], [80.0], [-88.0]])


def _ties_of_bf16() -> Tensor:
    """[4, 100]: numbers half way between two of bf16, and their neighbours."""
    x = host.normal(seeded(3), 4, 100)
    half = (x.view(torch.int32) & -65536 | 0x8000).view(torch.float32)
    step = host.integers(seeded(4), -1, 2, (4, 100)).int()
    return (half.view(torch.int32) + step).view(torch.float32)


def _no_numbers() -> Tensor:
    """[6, 12]: NaN of every kind, infinities, both zeros."""
    x = host.normal(seeded(5), 6, 12)
    patterns = torch.tensor(
        [-1, 0x7FC00000, 0x7FFFFFFF, -0x400000], dtype=torch.int32, device="cpu"
    )
    nan = patterns.view(torch.float32)
    x[0, 3:7], x[1, ::5], x[2, :] = nan, torch.inf, -torch.inf
    x[3, 2:9:2], x[4, 1:5], x[4, 7:11] = nan, nan, host.fp32([0.0, -0.0, 0.0, -0.0])
    x[5, 2:] = nan[0]
    return x


def _subnormal_bias() -> RoutingCall:
    """Scores of 0, to which a negative bias that counts as -0 adds nothing."""
    how = Routing(RoutingMethodType.MiniMax2, 3)
    bias = host.fp32([-1e-39, 0.0, 1e-39, 0.0] * 3)
    return RoutingCall(((how, host.full((2, 12), -120.0), bias),))


def _by_each_method(logits: Tensor, bias: Tensor | None = None) -> RoutingCall:
    found = []
    for method in METHODS:
        k = 1 if method == RoutingMethodType.Llama4 else 7
        how = Routing(method, k, routed_scaling_factor=2.5 if method.biased else None)
        found.append((how, logits, bias if method.biased else None))
    return RoutingCall(tuple(found))


def _of_a_gpu(bias: Tensor) -> RoutingCall:
    """By an H200's functions: of every size, of no numbers, and Default's sum by blocks."""
    special = host.fp32(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -3e38, 88.5, -87.4, 16.1]
    )
    rows = torch.cat(
        [host.normal(seeded(7), 3, 100) * host.fp32([[0.02], [1.0], [30.0]]), _large()[:2]]
    )
    rows[0, :10] = special
    whole = _by_each_method(rows, bias).routers
    blocks = host.normal(seeded(8), 65, 160) * 4, host.normal(seeded(9), 2, 256) * 4
    found = [*whole, *((Routing(RoutingMethodType.Default, 2), logits, None) for logits in blocks)]
    return RoutingCall(tuple((replace(how, functions="hopper"), x, b) for how, x, b in found))


def _dense_of_a_gpu() -> RoutingCall:
    """By an H200's functions: Default's near scores, and those of more experts than a block has."""
    how = Routing(RoutingMethodType.Default, 24, functions="hopper")
    many, few = host.normal(seeded(9), 2, 300), host.normal(seeded(11), 2, 24)
    least = replace(how, top_k=5), few, None
    return RoutingCall((*((how, logits, None) for logits in (_near(), _dense(), many)), least))


def _groups_apart_by_ulps(groups: int, experts: int) -> tuple[Tensor, Tensor]:
    """(logits, bias): every group's two best scores have a sum near 3, whatever the size of the best."""
    best = host.fp32([1.75, 1.0, 1.25, 2.0, 1.5])[:groups]
    bias, logits = host.full((groups, experts // groups), -3.0), host.zeros(32, groups, 2)
    bias[:, 3], bias[:, 7] = best, 2.0 - best
    logits += host.normal(seeded(12), 32, groups, 2) * 2.0**-20
    every = host.zeros(32, groups, experts // groups)
    every[:, :, [3, 7]] = logits
    return every.flatten(1), bias.flatten()


def _grouped(bias: Tensor) -> RoutingCall:
    """By DeepSeekV3 in 2, 4 and 5 groups: none fills its lanes, and the last has the best experts.

    Scores equal, apart by an ulp, and negative; a bias that bf16 rounds; no numbers.
    """
    three = Routing(RoutingMethodType.DeepSeekV3, 6, n_group=5, topk_group=3)
    four = replace(three, top_k=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    two = replace(three, top_k=7, n_group=2, topk_group=1)
    spread = host.normal(seeded(10), 9, 100) + host.arange(100) / 64
    found = []
    for how, experts in ((three, 100), (four, 60), (two, 24)):
        logits = torch.cat([spread, _near(), _no_numbers().repeat(1, 9)[:, :100]])[:, :experts]
        found += [(how, logits, b[:experts]) for b in (bias, bias - 3, bias.bfloat16())]
        found.append((how, host.full((2, experts), 0.5), host.zeros(experts)))
        found.append((how, *_groups_apart_by_ulps(how.n_group or 1, experts)))
        # One large score in each group decides nothing without the second.
        alone = host.zeros(3, experts)
        alone[:, 1 :: experts // (how.n_group or 1)] = host.fp32([[0.5], [1.0], [4.0]])
        found.append((how, alone + spread[:3, :experts] / 8, host.zeros(experts)))
    return RoutingCall(tuple(found))


def named() -> Iterator[tuple[str, Callable[[], RoutingCall]]]:
    bias = host.normal(seeded(6), 100) / 64
    yield "routers, near", lambda: _by_each_method(_near())
    yield "routers, near, bias", lambda: _by_each_method(_near(), bias * 2.0**-16)
    softmax = Routing(RoutingMethodType.Default, 24)
    sigmoid = Routing(RoutingMethodType.SigmoidRenorm, 24)
    order_of_the_sum = softmax, _near()[1:2], None  # decides it, as a search has found
    yield (
        "routers, dense",
        lambda: RoutingCall(
            ((softmax, _dense(), None), (sigmoid, _dense(), None), order_of_the_sum)
        ),
    )
    yield "routers, subnormal bias", _subnormal_bias
    yield "routers, groups", lambda: _grouped(bias)
    yield "routers, large", lambda: _by_each_method(_large())
    yield "routers, ties of bf16", lambda: _by_each_method(_ties_of_bf16(), bias.bfloat16())
    yield "routers, of a GPU", lambda: _of_a_gpu(bias)
    yield "routers, of a GPU, dense", _dense_of_a_gpu
    yield "routers, no numbers", lambda: _by_each_method(_no_numbers())
