"""Intervals of FlashInfer 0.7.4's Frost W4A16 layer, in fp64, from its rounding points.

Read from `fma/bf16/fma_fc1.py` and `fma/bf16/fma_fc2.py`:

- FC1 sums in fp32, multiplies the sum by the expert's scale, and rounds to bf16.
- The activation is in fp32, and its result is rounded to bf16.
- FC2 sums and scales as FC1 does, and rounds each slot's row to bf16.
- Finalize multiplies a row by its weight and adds, both in fp32, in the order of the slots. The sum is
  rounded to bf16.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cpu")
_E2M1 = torch.cat([_VALUES, -_VALUES])
_U = 2.0**-24  # the unit roundoff of fp32
_LOWEST_SILU = (-1.2784645, -0.2784646)  # where silu is lowest, and a bound of it there


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return fp64 values [..., n] of e2m1 codes [..., n / 2] and e4m3 scales [..., n / 16]."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    blocks = _E2M1[nibbles].unflatten(-1, (-1, 16))
    return (blocks * scales.view(torch.float8_e4m3fn).double()[..., None]).flatten(-2)


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16().double()


def _rounded(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 interval of an fp32 product by a scale."""
    return _bf16(low - low.abs() * _U * 2), _bf16(high + high.abs() * _U * 2)


def _silu(gate: torch.Tensor) -> torch.Tensor:
    return gate / (1 + torch.exp(-gate))


def _gated(
    up: tuple[torch.Tensor, torch.Tensor], gate: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU; its exponential and division may err by 2^-19 of the result."""
    ends = [_silu(g) for g in gate]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    at, lowest = _LOWEST_SILU
    low = torch.where((gate[0] < at) & (gate[1] > at), lowest, low)
    four = torch.stack([u * g for u in up for g in (low, high)])
    low, high = four.amin(0), four.amax(0)
    slack = torch.maximum(low.abs(), high.abs()) * 2.0**-19 + 2.0**-126
    return _rounded(low - slack, high + slack)


def _relu2(x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (torch.relu(end) for end in x)
    return _rounded(low * low, high * high)


def _row(
    x: torch.Tensor,
    w1: torch.Tensor,
    scales1: torch.Tensor,
    w2: torch.Tensor,
    scale2: torch.Tensor,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One slot's row [hidden]. A sum of n terms errs by at most n u times the sum of their sizes."""
    terms = w1 * x
    total, error = terms.sum(1), terms.shape[1] * _U * terms.abs().sum(1)
    branches = [
        _rounded((s - e) * scale, (s + e) * scale)
        for s, e, scale in zip(
            total.chunk(len(scales1)), error.chunk(len(scales1)), scales1, strict=True
        )
    ]
    low, high = _gated(*branches) if gated else _relu2(*branches)
    middle, radius = (low + high) / 2, (high - low) / 2
    total = (w2 * middle).sum(1)
    error = (w2.abs() * radius).sum(1)
    error = error + (w2.shape[1] + 2) * _U * (w2.abs() * (middle.abs() + radius)).sum(1)
    return _rounded((total - error) * scale2, (total + error) * scale2)


def bounds(
    x: torch.Tensor,
    w1: torch.Tensor,
    scales1: torch.Tensor,
    w2: torch.Tensor,
    scales2: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest output [tokens, hidden] that keep the contract.

    All are fp64 but `ids`: `x` [tokens, hidden], `w1` [experts, branches * inner, hidden] with the gate
    second, `scales1` [experts, branches], `w2` [experts, hidden, inner], `scales2` [experts] (none is
    negative), `ids` and `weights` [tokens, top_k]. SwiGLU is applied if `gated`, else squared ReLU.
    """
    low = high = sizes = torch.zeros(len(x), w2.shape[1], dtype=torch.float64, device="cpu")
    for slot in range(ids.shape[1]):
        rows = [
            _row(x[token], w1[e], scales1[e], w2[e], scales2[e], gated)
            for token, e in enumerate(ids[:, slot].tolist())
        ]
        weight = weights[:, slot, None]
        ends = [torch.stack(end) * weight for end in zip(*rows, strict=True)]
        low, high = low + torch.minimum(*ends), high + torch.maximum(*ends)
        sizes = sizes + torch.maximum(ends[0].abs(), ends[1].abs())
    slack = sizes * _U * (ids.shape[1] + 1)
    return _bf16(low - slack), _bf16(high + slack)
