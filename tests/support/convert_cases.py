"""Small checkpoints to convert, and what their conversion must be."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import torch
from checkpoint_cases import (
    HIDDEN,
    NAMINGS,
    Naming,
    assert_same_experts,
    ordinary,
    others,
    weights,
    write,
)

from nvfp4_moe.checkpoints import load_experts
from nvfp4_moe.cli.convert import RECIPES
from nvfp4_moe.reference.weights.prepare import prepare_experts

QWEN = NAMINGS["qwen3-moe"]
LAYERS = (0, 1)


def source(path: Path, naming: Naming = QWEN, dtype=torch.bfloat16, split=None) -> dict:
    """A bf16 or fp16 checkpoint; its weights by layer. `split` makes the shards of all tensors."""
    made, tensors = {}, {"lm_head.weight": torch.ones(8, HIDDEN).bfloat16()}
    for layer in LAYERS:
        made[layer] = weights(naming.activation.gated, seed=layer, dtype=dtype)
        tensors |= ordinary(naming, layer, made[layer]) | others(naming, layer)
    write(path, [tensors] if split is None else split(tensors), dict(naming.config))
    return made


def by_layer(tensors: dict) -> list[dict]:
    """A shard for each layer, and one for the rest."""
    parts = [{n: t for n, t in tensors.items() if f"layers.{layer}." in n} for layer in LAYERS]
    return [*parts, {n: t for n, t in tensors.items() if not any(n in p for p in parts)}]


def assert_converted(folder: Path, naming: Naming, made: dict, recipe: str = "exact") -> None:
    for layer, w in made.items():
        want = prepare_experts(w.w13, w.down, naming.activation, recipe=RECIPES[recipe])
        assert_same_experts(load_experts(folder, layer), want)
