"""NVFP4 experts of transformers modules, computed again in plain torch: quantize, multiply, scale.

Nothing of the library is used, so that the two can be held beside each other. The arithmetic is that of
exact math (`reference/quantize.py` has the order of its roundings), each product is summed in fp64, and
the activation is the module's own `_apply_gate` or `act_fn`, in fp32.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 448.0 * 6


class Values(NamedTuple):
    """Rows as NVFP4 keeps them: codes times block scales [R, K], and fp32 scales [R, 1]."""

    units: torch.Tensor
    scales: torch.Tensor


def rounded_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest values of E2M1; of two, the one whose code is even."""
    grid = torch.tensor(E2M1, dtype=torch.float32, device=x.device)
    middles = (grid[1:] + grid[:-1]) / 2
    size = x.abs().contiguous()
    lower, upper = (torch.bucketize(size, middles, right=right) for right in (False, True))
    return grid[torch.where(lower % 2 == 0, lower, upper)] * x.sign()


def quantized(x: torch.Tensor, encode: torch.Tensor) -> Values:
    """Quantize rows [R, K] with an encode scale [R] each."""
    one = encode[:, None]
    blocks = x.float().unflatten(1, (-1, 16))
    block_scales = (blocks.abs().amax(2) * (one * (1 / 6))).to(torch.float8_e4m3fn).float()
    factor = 1 / (block_scales * (1 / one))
    factor = torch.where(block_scales == 0, 0.0, factor)[..., None]
    units = rounded_to_e2m1(blocks * factor) * block_scales[..., None]
    return Values(units.flatten(1), 1 / one)


def quantized_rows(x: torch.Tensor) -> Values:
    """Quantize each row by its own maximum: a token's scale."""
    amax = x.float().abs().amax(1)
    # `LARGEST / amax` would be a reciprocal and a product, which round twice.
    return quantized(x, torch.where(amax == 0, 1.0, torch.full_like(amax, LARGEST) / amax))


def quantized_weight(w: torch.Tensor) -> Values:
    """Quantize [N, K] by the maximum of all rows: an expert's scale."""
    amax = w.float().abs().amax()
    return quantized(w, ((1 / amax) * LARGEST).expand(len(w)))


def unquantized(x: torch.Tensor) -> Values:
    return Values(x.float(), torch.ones(len(x), 1, dtype=torch.float32, device=x.device))


def product(x: Values, w: Values) -> torch.Tensor:
    """x w^T with one rounding for the sum, one for each scale."""
    return (x.units.double() @ w.units.double().T).float() * x.scales * w.scales.T


def experts_forward(quantizes_activations, module, hidden_states, top_k_index, top_k_weights):
    """The experts function that transformers calls, an expert at a time."""
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    first, second = (getattr(module, name) for name in names)
    if module.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    activations = quantized_rows if quantizes_activations else unquantized
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    rows = out.new_zeros(*top_k_index.shape, hidden_states.shape[1])
    for e in range(len(first)):
        token, slot = torch.where(top_k_index == e)
        if not len(token):
            continue
        y = product(activations(hidden_states[token]), quantized_weight(first[e]))
        if module.has_bias:
            y = y + getattr(module, f"{names[0]}_bias")[e].float()
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = product(activations(y.bfloat16()), quantized_weight(second[e]))
        if module.has_bias:
            y = y + getattr(module, f"{names[1]}_bias")[e].float()
        rows[token, slot] = y.bfloat16().float() * top_k_weights[token, slot, None].float()
    for slot in range(rows.shape[1]):
        out = out + rows[:, slot]
    return out.to(hidden_states.dtype)
