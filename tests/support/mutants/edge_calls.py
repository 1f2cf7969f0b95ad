"""Calls of the Triton kernels on inputs that show what ordinary numbers hide."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nvfp4_moe import host
from nvfp4_moe.cases import moe_edges
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.differential.verdict import unequal
from nvfp4_moe.kernels.moe import routing
from nvfp4_moe.kernels.moe.finalize import finalize
from nvfp4_moe.reference.bounds.interval import Interval, rounded
from nvfp4_moe.reference.moe.routing import METHODS, Routing, RoutingMethodType, route
from nvfp4_moe.reference.recipe import Recipe

from .calls import Answered, FusedCall

Tensor = torch.Tensor
_M = RoutingMethodType
ACCURACY = 2.0**-17
"""Relative error that the kernels' activations may have: far less than the intervals allow others."""
BELOW_NORMAL = 2.0**-122
"""Their error where the result is below fp32's normal numbers, 2^-126, for arguments up to 16."""


@dataclass(frozen=True)
class ActivationCall(FusedCall):
    """A call whose output is the activation in bf16, judged by our kernels' own accuracy."""

    def judge(self) -> Answered:
        result = self.case.run(keep_steps=True)
        exact = result.steps["activated"][:, 0].double()
        error = exact.abs() * ACCURACY + BELOW_NORMAL
        allowed = rounded(torch.bfloat16, Interval.point(exact).widened(error))
        want = result.output.double()
        columns = exact.shape[1]  # those behind them are zero in every case

        def accepts(got: Tensor) -> bool:
            return bool(allowed.contains(got[:, :columns]).all() and not got[:, columns:].any())

        return Answered(accepts, torch.Tensor.double, want)


@dataclass(frozen=True)
class RoutingCall:
    """Routers [T, E], each by its own method."""

    routers: tuple[tuple[Routing, Tensor, Tensor | None], ...]

    def answer(self, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        found = []
        for how, logits, bias in self.routers:
            given = None if bias is None else bias.to(device)
            ids, weights = routing.route(logits.to(device), how, given)
            found.append((ids.cpu(), weights.cpu()))
        return found

    def judge(self) -> Answered:
        """The reference's ids and weights, to the bit but for a NaN's: our kernel has its arithmetic."""
        right = [route(logits, how, bias) for how, logits, bias in self.routers]

        def accepts(got: list[tuple[Tensor, Tensor]]) -> bool:
            return all(
                torch.equal(ids, r.ids)
                and torch.equal(weights.isnan(), r.weights_bf16.isnan())
                and not unequal(weights.nan_to_num(0.0), r.weights_bf16.nan_to_num(0.0)).any()
                for r, (ids, weights) in zip(right, got, strict=True)
            )

        def values(got: Any) -> Tensor:
            full = [
                host.zeros(*logits.shape).scatter(1, ids.long(), weights.float())
                for (_, logits, _), (ids, weights) in zip(self.routers, got, strict=True)
            ]
            return torch.cat([t.flatten() for t in full]).double()

        return Answered(accepts, values, values([(r.ids, r.weights_bf16) for r in right]))


@dataclass(frozen=True)
class FarRowsCall:
    """The finalize of rows whose first element is 2^31 elements behind the first row's."""

    width: int = 64

    def answer(self, device: str = "cpu") -> Tensor:
        # Pages that nobody touches take no memory; an index of 32 bits falls on the half before.
        far = 2**31
        memory = torch.from_numpy(np.zeros(2 * far + 8 * self.width, np.int16)).view(torch.bfloat16)
        if device != "cpu":
            memory = torch.empty_like(memory, device=device)
        rows = memory[far:].view(-1, self.width)
        rows[-8:] = self._rows()
        first = rows.shape[0] - 8
        permuted = host.arange(first, first + 8).int().to(device)
        output = torch.empty(4, self.width, dtype=torch.bfloat16, device=device)
        finalize(rows, permuted, host.ones(4, 2).to(device), output, "slot")
        return output.cpu()

    def _rows(self) -> Tensor:
        return host.arange(8 * self.width).view(8, self.width).remainder(64).bfloat16()

    def judge(self) -> Answered:
        want = self._rows().float().view(4, 2, self.width).sum(1).bfloat16()
        return Answered(
            lambda got: not unequal(got, want).any(), torch.Tensor.double, want.double()
        )


def _edge(name: str) -> MoECase:
    (found,) = (case for case in moe_edges.cases(Recipe()) if case.name == name)
    return found


def _fused(name: str) -> Callable[[], FusedCall]:
    return lambda: FusedCall(_edge(name))


def _activation(name: str) -> Callable[[], FusedCall]:
    return lambda: ActivationCall(_edge(name))


def every_method() -> RoutingCall:
    """Logits of every size, ties and NaN-free specials among them, by each method; biases."""
    g = torch.Generator().manual_seed(5)
    logits = host.normal(g, 6, 12) * host.powers(host.arange(-1, 5))[:, None]
    logits[1, 3:7] = logits[1, 2]
    logits[2, ::5] = -0.0
    bias = host.normal(g, 12)
    found = []
    for method in METHODS:
        k = 1 if method == _M.Llama4 else 3
        how = Routing(method, k, routed_scaling_factor=2.5 if method.biased else None)
        for values in (logits, logits.bfloat16()):
            found.append((how, values, bias if method.biased else None))
    found.append((Routing(_M.SigmoidRenorm, 3, norm_topk_prob=False), logits, None))
    return RoutingCall(tuple(found))


def undecided() -> RoutingCall:
    found = [
        (how, logits.float(), bias)
        for _, how, logits, bias in moe_edges.routers()
        if not how.grouped
    ]
    return RoutingCall(tuple(found))


def saturated() -> RoutingCall:
    """Logits whose sigmoid is 0 in fp32, so that its sums are."""
    logits = (host.arange(12).float() - 120).expand(2, -1).contiguous()
    how = (Routing(_M.DeepSeekV3, 3), Routing(_M.SigmoidRenorm, 3))
    return RoutingCall(tuple((h, logits, None) for h in how))


EDGE_CALLS: dict[str, Callable[[], Any]] = {
    "far below": _fused("Identity, blocks far below their row's maximum"),
    "any size, to fp32": _fused("Relu2, float32 weights of any size, to fp32"),
    "cancelling sums": _fused("Identity, sums that cancel"),
    "SwigluStep alone": _activation("SwigluStep, the activation alone"),
    "GegluTanh alone": _activation("GegluTanh, the activation alone"),
    "Situ alone": _activation("Situ, the activation alone, parameters"),
    "Geglu alone": _activation("Geglu, the activation alone"),
    "Swiglu, static": _fused("Swiglu, static, small"),
    "every routing method": every_method,
    "undecided routers": undecided,
    "saturated routers": saturated,
    "far rows": FarRowsCall,
}
"""By name."""
