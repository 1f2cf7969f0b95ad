"""Probe how a backend accumulates: its fused layer computes sums that show which bits it keeps.

`reference.bounds.interval` assumes that a step of a tensor core keeps one bit more than fp32 has below
the largest of its terms, and takes at least 8 products. A row of the probe is a large product, small
ones in the blocks after it, and the large one's negative in the last block, so that what was kept of the
small ones remains: it goes through the first GEMM, the Identity and a second GEMM that picks one
element.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from .. import host
from ..cases.moe_case import MoECase
from ..kernels import environment
from ..kernels.flashinfer import version
from ..kernels.moe.backends import FUSED_MOE
from ..reference.activation import ActivationType
from ..reference.moe.hidden_states import Activations
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.moe.variants import VARIANTS
from ..reference.numerics import e2m1, e4m3
from ..reference.recipe import BLOCK_SIZE, LayerBuild, Recipe
from ..reference.weights.prepare import assemble_experts

_BLOCKS = 16
_LARGE, _SMALL = 8, -8  # exponents of the weights' block scales
_ULP = 2.0 ** (2 * _LARGE - 23)  # of the large product
# Columns of a block that hold 1, 2 and 4 small products: in one step of 8, 8 and 16 whether K is taken
# in order, or every second or fourth column of a tile first, as the decoding of words makes it. The
# GEMM for sm_90 has the last four in two steps of 16 columns, and so shows one bit fewer.
_COLUMNS = (0x0001, 0x0011, 0x1111)
_KINDS: dict[str, tuple[ActivationType, LayerBuild, dict[str, Any]]] = {
    "flashinfer:cute-dsl": (ActivationType.Relu2, "cute-dsl", {}),
    # Encode scales of 1, and of 2^10 for the intermediate, of at most 24 ulps.
    "flashinfer:cutlass": (
        ActivationType.Identity,
        "cutlass",
        {"input_amax": 2688.0, "intermediate_amax": 2.625},
    ),
}
"""The layers without Identity or without per-token scales; their probes have no negative sums."""


@dataclass(frozen=True)
class Sums:
    extra_bits: int
    """Below the last bit of fp32 that a term keeps, as far as was looked: at most 2."""
    steps_of_8: bool
    """8 products at least are rounded at once; not asked where K is taken in another order."""
    nearest: bool
    """Rounds to nearest, as fp32 additions do; a tensor core cuts."""

    @property
    def as_assumed(self) -> bool:
        """True if the intervals of `reference.bounds` hold for this accumulation."""
        return self.nearest or (self.extra_bits >= 1 and self.steps_of_8)

    def __str__(self) -> str:
        verdict = "as assumed" if self.as_assumed else "NOT as assumed: the intervals do not hold"
        if self.nearest:
            return f"rounded to nearest: {verdict}"
        steps = "8 products or more" if self.steps_of_8 else "fewer than 8 products"
        bits = f"{self.extra_bits} bits{' or more' if self.extra_bits == len(_COLUMNS) - 1 else ''}"
        return f"cut {bits} below fp32's last, in steps of {steps}: {verdict}"


def measure(backend: str, device: torch.device | str) -> Sums:
    """Ask a backend of `FUSED_MOE.names`.

    Raises:
        UnsupportedError: it cannot serve the probe's layer (per token, Identity) here.
    """
    rows = [_row({1: columns}, 23 + bits) for bits, columns in enumerate(_COLUMNS)]
    # Three of every four products are 2^-24 of the large one.
    rows.append(_row(dict.fromkeys(range(1, 5), 0x7777), 24))
    rows.append(_row({1: 1}, 24, small=1.5))  # three quarters of an ulp
    codes, scales = (torch.stack(t).to(device) for t in zip(*rows, strict=True))
    kept = _ask(backend, codes, scales) / _ULP
    extra = 0
    for bits in range(len(_COLUMNS)):
        if round(kept[bits].item()) != 1:
            break
        extra = bits
    # 16 steps of four would each lose half of their last ulp; of eight products, none does: 24.
    # What was kept comes through a quantization: 3 % at most where its scale is static.
    return Sums(extra, kept[-2].item() > 20, abs(kept[-1].item() - 1) < 0.1)


def _row(
    terms: dict[int, int], exponent: int, small: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block scales of hidden states.

    Args:
        terms: in which columns of a block there are small products, as bits.
        exponent: they are `small` times 2^-exponent of the large one.
    """
    value = host.zeros(_BLOCKS, BLOCK_SIZE)
    scale = host.full((_BLOCKS,), 2.0 ** (2 * _LARGE - _SMALL - exponent))
    value[0, 0], value[-1, 0] = 1.0, -1.0
    scale[0] = scale[-1] = 2.0**_LARGE
    for block, columns in terms.items():
        for i in range(BLOCK_SIZE):
            value[block, i] = small * (columns >> i & 1)
    codes = e2m1.pack(e2m1.encode(value.flatten()))
    return codes, e4m3.encode(scale)


def _ask(backend: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Run the layer; returns the sums as the backend rounded them, [T] fp64."""
    case = _case(backend, codes, scales)
    sums = FUSED_MOE.serve(case.request(), backend)[0][:, 0].double().cpu()
    return sums.sqrt() if case.experts.activation == ActivationType.Relu2 else sums


def _case(backend: str, codes: torch.Tensor, scales: torch.Tensor) -> MoECase:
    """Make the layer: an expert of ones in the first GEMM, of one 1 in the second."""
    device, tokens, h, i = codes.device, codes.shape[0], _BLOCKS * BLOCK_SIZE, 128
    one = int(e2m1.encode(host.ones(1)))
    exponents = host.full((_BLOCKS,), 2.0**_SMALL)
    exponents[0] = exponents[-1] = 2.0**_LARGE
    w13 = torch.full((1, i, h // 2), one * 17, dtype=torch.uint8, device=device)
    w2 = torch.zeros(1, h, i // 2, dtype=torch.uint8, device=device)
    w2[0, 0, 0] = one
    scale = int(e4m3.encode(host.ones(1)))
    w2_scales = torch.full((1, h, i // BLOCK_SIZE), scale, dtype=torch.uint8, device=device)
    unit = host.ones(1).to(device)
    kind, build, static = _KINDS.get(backend, (ActivationType.Identity, "cuda", {}))
    experts = assemble_experts(
        w13,
        e4m3.encode(exponents).expand(1, i, -1).contiguous().to(device),
        unit,
        w2,
        w2_scales,
        unit,
        kind,
        **static,
    )
    variant = VARIANTS[build]
    token_scale = None if static else torch.ones(tokens, dtype=torch.float32, device=device)
    return MoECase(
        "sums",
        Activations(codes, scales.view(torch.float8_e4m3fn), token_scale),
        variant.prepared(experts),
        Routing(RoutingMethodType.Renormalize, 1),
        num_experts=1,
        ids=torch.zeros(tokens, 1, dtype=torch.int32, device=device),
        weights=torch.ones(tokens, 1, dtype=torch.float32, device=device),
        recipe=Recipe(
            environment.math(variant.quantizers), environment.four_over_six(), variant.quantizers
        ),
        build=build,
        finalize_order=variant.order(version.HERE.contract),
    )
