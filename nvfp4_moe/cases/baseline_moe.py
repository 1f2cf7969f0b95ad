"""The calls of the BF16, FP8 and MXFP8 layers that `nvfp4-moe diff` compares.

Some have real hidden states; in the others every sum is exact.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from .. import host
from ..kernels.baseline_moe.call import BaselineCall
from ..kernels.flashinfer.baseline_moe import flashinfer_weights
from ..reference.activation import ActivationType
from ..reference.moe.baseline_moe import (
    BaselineActivations,
    BaselineExperts,
    Format,
    baseline_moe,
    prepare_baseline,
    quantize_for,
)
from ..reference.moe.fp8 import BLOCK, MX_BLOCK
from ..reference.moe.routing import Routing, RoutingMethodType
from . import moe as moe_cases
from .moe import EXPERTS, INTERMEDIATE, TOKENS, TOP_K
from .moe_case import to_device

SWIGLU = ActivationType.Swiglu
HIDDEN = 256
"""The hidden size of the exact cases."""


@dataclass(frozen=True)
class BaselineCase:
    """One call with given ids [T, K] and weights [T, K]."""

    name: str
    activations: BaselineActivations
    experts: BaselineExperts
    ids: torch.Tensor
    weights: torch.Tensor
    num_experts: int = EXPERTS
    local_expert_offset: int = 0
    exact: bool = False
    """True if nothing rounds before the rows' sum, so that one output alone is right, to the bit."""

    def call(self) -> BaselineCall:
        return BaselineCall(
            self.activations,
            self.experts,
            flashinfer_weights(self.experts),
            Routing(RoutingMethodType.Renormalize, self.ids.shape[1]),
            self.num_experts,
            topk=(self.ids, self.weights),
            local_expert_offset=self.local_expert_offset,
        )

    def reference(self) -> torch.Tensor:
        """Return the reference's output, [T, H] bf16."""
        return baseline_moe(
            self.activations,
            self.experts,
            self.ids,
            self.weights,
            local_expert_offset=self.local_expert_offset,
        ).output

    def to(self, device: torch.device | str) -> "BaselineCase":
        """Return the case on another device."""
        return to_device(self, device)


def cases(format: Format) -> list[BaselineCase]:
    return [real_case(format), exact_case(format), exact_case(format, offset=2)]


def real_case(format: Format) -> BaselineCase:
    """Make calls of real hidden states and normal weights."""
    x = moe_cases.real_states(moe_cases.HIDDEN)
    w13, w2 = moe_cases.layer_weights(SWIGLU, x.shape[1])
    ids, weights = moe_cases.choice()
    maxima = {}
    if format == "fp8 per tensor":
        _, largest = moe_cases.exact_layer(x, w13, w2, ids, weights)
        maxima = {"input_amax": x.abs().max().item(), "intermediate_amax": largest}
    experts = prepare_baseline(format, w13, w2, SWIGLU, **maxima)
    return BaselineCase(f"{format}, Swiglu", quantize_for(x, experts), experts, ids, weights)


def exact_case(format: Format, offset: int = 0) -> BaselineCase:
    """Make SwiGLU calls with the same output in every format, since none of their steps rounds.

    A gate is 0 or at least 64, where its sigmoid is 1. Every block that is quantized on the way has a
    largest magnitude of 7 * 2^n, whose scale is a power of two, and the products are 7 * 2^n as well:
    one of up and gate is, and the other is a power of two. Eight of them are a row's sum. Codes differ
    between formats, whose scales differ from block to block.

    Args:
        offset: the first local expert, of EXPERTS more.
    """
    g = torch.Generator().manual_seed(11)
    signs = _signs(g, HIDDEN)
    shares = host.fp32([4.0, -2, 1, 1, 2, -1, 2, 1]).repeat_interleave(HIDDEN // 8) * signs
    x = host.zeros(TOKENS, 8, HIDDEN // 8)  # one value in each eighth, so that a row's sum is 8
    x.scatter_(2, host.integers(g, 0, HIDDEN // 8, (TOKENS, 8, 1)), 1.0)
    x = x.flatten(1) * signs * host.powers(host.arange(TOKENS).remainder(3))[:, None]

    size = (EXPERTS, INTERMEDIATE)
    seven = host.uniform(g, *size) < 0.5  # in the gate
    larger = host.integers(g, 0, 2, size)
    up = _signs(g, size) * (3.5 - 1.5 * seven.float()) * host.powers(larger)
    gate = (64.0 + 48.0 * seven.float()) * (host.uniform(g, *size) < 0.9)
    w13 = torch.cat([up, gate], 1)[..., None] / 8 * shares
    nonzero = host.uniform(g, EXPERTS, HIDDEN, INTERMEDIATE).argsort(2) < 8
    w2 = _signs(g, nonzero.shape) * nonzero
    activations, experts = _assembled(format, x, w13, w2)
    ids, _ = moe_cases.choice()
    if offset:
        ids = ids + host.arange(TOKENS).to(ids.dtype).remainder(EXPERTS + 1)[:, None]
    weights = host.powers(-host.arange(TOP_K).remainder(3)).expand(TOKENS, -1)
    where = f", experts {offset} to {offset + EXPERTS - 1}" if offset else ""
    return BaselineCase(
        f"{format}, sums exact{where}",
        activations,
        experts,
        ids,
        weights.bfloat16(),
        EXPERTS * (2 if offset else 1),
        offset,
        exact=True,
    )


def _signs(g: torch.Generator, size: torch.Size | tuple[int, ...] | int) -> torch.Tensor:
    size = (size,) if isinstance(size, int) else size
    return host.integers(g, 0, 2, size).float() * 2 - 1


def _assembled(
    format: Format, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> tuple[BaselineActivations, BaselineExperts]:
    """Encode these exact values in a format, as codes under scales that are powers of two."""

    def codes(values: torch.Tensor) -> torch.Tensor:
        kept = values.to(torch.float8_e4m3fn)
        assert torch.equal(kept.float(), values)
        return kept

    if format == "bf16":
        return BaselineActivations(x.bfloat16()), BaselineExperts(
            format, SWIGLU, w13.bfloat16(), w2.bfloat16()
        )
    if format == "fp8 per tensor":
        power = host.powers(host.arange(EXPERTS).remainder(3))
        experts = BaselineExperts(
            format,
            SWIGLU,
            codes(w13 * power[:, None, None]),
            codes(w2 / power[:, None, None]),
            power,
            1 / power,
            host.fp32(2.0),
            host.fp32(2.0**-4),
        )
        return BaselineActivations(codes(x * 2)), experts
    rows, columns = (BLOCK, BLOCK) if format == "fp8 block" else (1, MX_BLOCK)

    def scaled(values: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes, and the powers of the scales."""
        blocks = (*values.shape[:-2], values.shape[-2] // rows, values.shape[-1] // columns)
        place = sum(torch.meshgrid(*map(torch.arange, blocks), indexing="ij"))
        power = place.remainder(3) - 1  # type: ignore[union-attr]
        spread = power.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        return codes(values * 2.0**-spread), power

    (c, s), (c13, s13), (c2, s2) = scaled(x, 1), scaled(w13, rows), scaled(w2, rows)
    if format == "fp8 block":
        experts = BaselineExperts(format, SWIGLU, c13, c2, 2.0**s13, 2.0**s2)
        return BaselineActivations(c, (2.0**s).T.contiguous()), experts
    e8m0 = ((power + 127).to(torch.uint8) for power in (s, s13, s2))
    scale, scale13, scale2 = e8m0
    return BaselineActivations(c, scale), BaselineExperts(format, SWIGLU, c13, c2, scale13, scale2)
