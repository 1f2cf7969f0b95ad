"""The share of values that tensor parallelism changes: `python examples/tp_difference.py`.

The shipped intermediates (`inputs.activations`, inputs of down projections) are quantized per token:
once as whole rows, and once as shards that have row maxima of their own.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nvfp4_moe.cases.inputs import activations
from nvfp4_moe.reference.moe.hidden_states import hidden_values, quantize_activations
from nvfp4_moe.reference.moe.shards import shard_columns
from nvfp4_moe.reference.recipe import Recipe

SHARDS = (2, 4, 8)


def requantized(x: torch.Tensor, shards: int, recipe: Recipe) -> torch.Tensor:
    """[T, I] fp32: the values of x [T, I] bf16 after each shard's quantization."""
    parts = []
    for rank in range(shards):
        part = quantize_activations(
            x[:, shard_columns(x.shape[1], rank, shards)].contiguous(), recipe
        )
        assert part.per_token_scale is not None
        parts.append(hidden_values(part) * part.per_token_scale[:, None])
    return torch.cat(parts, 1)


def changed(x: torch.Tensor, shards: int, recipe: Recipe) -> float:
    """The share of values that `shards` shards make other than one does."""
    return (requantized(x, shards, recipe) != requantized(x, 1, recipe)).double().mean().item()


def main() -> None:
    recipe = Recipe()
    print(f"{'values that change':<23}", *(f"TP {n:<3}" for n in SHARDS), sep="  ")
    for name, x in sorted(activations().items()):
        if name.endswith("ffn_mid"):
            shares = (f"{changed(x, n, recipe):6.1%}" for n in SHARDS)
            print(f"{name:<23}", *shares, sep="  ")


if __name__ == "__main__":
    main()
