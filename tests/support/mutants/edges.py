"""Settings whose inputs show mistakes that ordinary numbers hide; `matrix_edges` has those of `diff`."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import inputs, moe_edges
from nvfp4_moe.differential.conforming import Setting
from nvfp4_moe.differential.stages import Call
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1, e4m3
from nvfp4_moe.reference.recipe import BLOCK_SIZE, NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts

_M = RoutingMethodType
_SIZE = 128


@dataclass(frozen=True)
class EdgeSetting(Setting):
    """A setting that makes its call otherwise."""

    made: Callable[[int], Call] | None = None

    def call(self, seed: int) -> Call:
        assert self.made is not None
        return self.made(seed)


def _setting(name: str, routing: Routing, made: Callable[[int], Call]) -> EdgeSetting:
    return EdgeSetting(
        name, 8, _SIZE, _SIZE, 4, routing, ActivationType.Identity, recipe=made(0).recipe, made=made
    )


def _normal(seed: int, *size: int) -> torch.Tensor:
    return host.normal(torch.Generator().manual_seed(seed), *size)


def _experts(seed: int, count: int = 4) -> Experts:
    w13, w2 = _normal(seed, count, _SIZE, _SIZE) / 8, _normal(seed + 9, count, _SIZE, _SIZE) / 8
    return prepare_experts(w13.bfloat16(), w2.bfloat16(), ActivationType.Identity)


def _far_below(seed: int) -> Call:
    """Blocks far below their row's maximum, which every second block of rows reads alone."""
    x = _normal(seed, 8, _SIZE)
    x[:, BLOCK_SIZE:] *= 2.0**-15
    w13, w2 = _normal(seed + 1, 4, _SIZE, _SIZE), _normal(seed + 2, 4, _SIZE, _SIZE)
    block = host.arange(_SIZE) // BLOCK_SIZE
    w13[:, block % 4 == 1, :BLOCK_SIZE] = 0
    w13[:, block % 4 == 3] *= 2.0**-15
    row = host.arange(_SIZE)[:, None] % 4
    # Rows of four kinds: of the intermediate's even blocks, of the others, of the smallest, of small
    # weights.
    read = (
        (row == 0) & (block % 2 == 0)
        | (row % 2 == 1) & (block % 4 == 1)
        | (row == 2) & (block % 4 == 3)
    )
    w2 = w2 * read * host.powers(-16 * (row == 3))
    experts = prepare_experts(w13.bfloat16(), w2.bfloat16(), ActivationType.Identity)
    return _call(seed, x.bfloat16(), experts)


def _any_size(seed: int) -> Call:
    """Tokens that fp16 cannot hold, and a router that leaves some experts 2^-40 of a weight."""
    size = host.powers(host.fp32([20, -30, 17, -17, 40, -40, 0, 3]))[:, None]
    logits = host.arange(4).float() * 8 + _normal(seed, 8, 4)
    experts = _experts(seed)
    scalar = experts.output2_scale_scalar * host.powers(-11 * host.arange(4))
    call = _call(
        seed,
        (_normal(seed, 8, _SIZE) * size).bfloat16(),
        replace(experts, output2_scale_scalar=scalar),
        4,
    )
    return replace(call, logits=logits)


def _call(seed: int, x: torch.Tensor, experts: Experts, top_k: int = 2) -> Call:
    logits = _normal(seed + 3, x.shape[0], experts.num_local)
    return Call(logits, Routing(_M.Renormalize, top_k), None, x, experts)


def _four_over_six(seed: int) -> Call:
    """Rows whose candidates err nearly alike, found by search: hidden states, then intermediates.

    Of the hidden states behind, a token reads one column of the weights, which is such a row.
    """
    rows = inputs.synthetic("grid", 1500, _SIZE, seed=3)[[23, 48, 74, 290, 293, 428, 436, 497]]
    columns = torch.eye(8, dtype=torch.float32, device="cpu").repeat_interleave(BLOCK_SIZE, 1) * (
        host.arange(_SIZE) % BLOCK_SIZE == 0
    )
    codes = torch.where(rows.T < 0, 0xA, 0x2).to(torch.uint8)  # of -1 and 1
    w13 = torch.zeros(_SIZE, _SIZE, dtype=torch.uint8, device="cpu")
    w13[:, ::BLOCK_SIZE] = codes
    scales = e4m3.encode(rows.T.float().abs())
    w2 = e2m1.pack(torch.eye(_SIZE, dtype=torch.uint8, device="cpu") * 2)
    codes13, scales13 = (t.expand(4, -1, -1).contiguous() for t in (e2m1.pack(w13), scales))
    experts = assemble_experts(
        codes13,
        scales13,
        host.ones(4),
        w2.expand(4, -1, -1).contiguous(),
        torch.full((4, _SIZE, _SIZE // BLOCK_SIZE), 0x38, dtype=torch.uint8, device="cpu"),
        host.ones(4),
        ActivationType.Identity,
    )
    call = _call(seed, torch.cat([rows, columns.bfloat16()]), experts)
    return replace(call, recipe=Recipe("fast", NVFP44Over6Config()))


def _routed(name: str, method: RoutingMethodType) -> Callable[[int], Call]:
    """One of `matrix_edges.routers`."""
    found = [r for r in moe_edges.routers() if r[0] == name and r[1].method == method]
    ((_, routing, logits, bias),) = found

    def call(seed: int) -> Call:
        x = _normal(seed, logits.shape[0], _SIZE).bfloat16()
        return Call(logits, routing, bias, x, _experts(seed, logits.shape[1]))

    return call


def _saturated(seed: int) -> Call:
    """Logits whose sigmoid is 0, so that a sum of weights is."""
    call = _routed("a bias between numbers of bf16", _M.DeepSeekV3)(seed)
    return replace(call, logits=call.logits - 60)


EDGES = {
    s.name: s
    for s in (
        _setting("far below", Routing(_M.Renormalize, 2), _far_below),
        _setting("any size", Routing(_M.Renormalize, 4), _any_size),
        _setting("near ties of 4over6", Routing(_M.Renormalize, 2), _four_over_six),
        _setting("near logits", Routing(_M.Renormalize, 2),
                 _routed("logits near each other", _M.Renormalize)),
        _setting("negative groups", Routing(_M.DeepSeekV3, 4, 4, 2, 2.5),
                 _routed("groups, all scores negative", _M.DeepSeekV3)),
        _setting("equal groups", Routing(_M.DeepSeekV3, 4, 4, 2, 2.5),
                 _routed("groups, three of them equal", _M.DeepSeekV3)),
        _setting("fine bias", Routing(_M.DeepSeekV3, 4, 4, 2, 2.5),
                 _routed("groups, a bias between numbers of bf16", _M.DeepSeekV3)),
        _setting("saturated", Routing(_M.DeepSeekV3, 4, None, None, 2.5), _saturated),
    )
}  # fmt: skip
