"""Inputs of the fused mixture of experts, small and made the same way everywhere."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace

import torch

from nvfp4_moe.reference.activation import IMPLEMENTED, ActivationType
from nvfp4_moe.reference.moe.activations import Activations, quantize_activations
from nvfp4_moe.reference.moe.permute import local_slots
from nvfp4_moe.reference.quantize import quantize_global_scale
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import prepare_experts

GATED = [a for a in IMPLEMENTED if a.gated]
PLAIN = [a for a in IMPLEMENTED if not a.gated]


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    offset: int = 0  # the first local expert
    local: int | None = None  # how many; None: all

    @property
    def num_local(self) -> int:
        return self.experts if self.local is None else self.local

    def __str__(self) -> str:
        return (
            f"T={self.tokens}-H={self.hidden}-I={self.intermediate}-E={self.experts}"
            f"-K={self.top_k}-local={self.offset}+{self.num_local}"
        )


@dataclass(frozen=True)
class Case:
    activations: Activations
    experts: Experts
    ids: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor  # [T, H] bf16, before quantization
    w13: torch.Tensor
    w2: torch.Tensor


def weights_of(shape: Shape, activation: ActivationType, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    rows = shape.intermediate * (2 if activation.gated else 1)
    # The experts differ in size, so that scalars of another expert show.
    size = 2.0 ** torch.arange(shape.num_local).remainder(5).sub(2)[:, None, None]
    w13 = torch.randn(shape.num_local, rows, shape.hidden, generator=g) * size / shape.hidden**0.5
    w2 = torch.randn(shape.num_local, shape.hidden, shape.intermediate, generator=g) * size
    return w13.bfloat16(), (w2 / shape.intermediate**0.5).bfloat16()


def routing_of(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    g = torch.Generator().manual_seed(seed + 1)
    scores = torch.rand(shape.tokens, shape.experts, generator=g)
    weights, ids = scores.topk(shape.top_k, dim=1)
    return ids.int(), weights.to(dtype)


def hidden_states(shape: Shape, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 2)
    x = torch.randn(shape.tokens, shape.hidden, generator=g)
    return (x * torch.exp2(torch.arange(shape.tokens).remainder(7) - 3.0)[:, None]).bfloat16()


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def with_strange_weights(case: Case, shape: Shape) -> Case:
    """The case with an id of -1 in each second token, and NaN, inf, -inf where no expert is local."""
    ids = case.ids.clone()
    ids[::2, 0] = -1
    nowhere = ~local_slots(ids, shape.num_local, shape.offset)
    assert nowhere.any() and not nowhere.all()
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(case.weights)
    place = torch.arange(ids.numel()).view(ids.shape) % 3
    return replace(case, ids=ids, weights=torch.where(nowhere, strange[place], case.weights))


def make(
    shape: Shape,
    activation: ActivationType = ActivationType.Swiglu,
    mode: str = "per-token",
    seed: int = 0,
    weights_dtype: torch.dtype = torch.bfloat16,
    **options,
) -> Case:
    """mode: "per-token", "static" or "bf16"; options go to `prepare_experts`."""
    w13, w2 = weights_of(shape, activation, seed)
    x = hidden_states(shape, seed)
    if mode == "static":
        options |= {"input_amax": x.abs().max().item(), "intermediate_amax": 60.0}
    experts = prepare_experts(w13, w2, activation, **options)
    wide = padded(x, experts.padded_hidden_size)
    if mode == "per-token":
        activations = quantize_activations(wide, Recipe())
    elif mode == "static":
        q = quantize_global_scale(wide, experts.input_scale, Recipe())
        activations = Activations(q.codes, q.block_scales)
    else:
        activations = Activations(wide)
    ids, weights = routing_of(shape, seed, weights_dtype)
    return Case(activations, experts, ids, weights, x, w13, w2)
