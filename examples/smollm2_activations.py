"""Captures the activations of SmolLM2 that ship: `python examples/smollm2_activations.py`.

Takes the inputs of both feed-forward products of three layers, in bf16, on tokens of Python's
documentation, and writes `nvfp4_moe/data/smollm2_activations.safetensors.xz`.
"""

# SPDX-License-Identifier: Apache-2.0
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import smollm2  # noqa: E402
from smollm2 import SmolLM2  # noqa: E402
from smollm2_perplexity import ranges_of, texts  # noqa: E402

FILE = ROOT / "nvfp4_moe" / "data" / "smollm2_activations.safetensors.xz"
LAYERS = (0, 15, 29)
TEXTS, STEP = 3, 32  # the first tokens of the texts among them, whose intermediates are the largest
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]  # 2 bytes an element


@torch.no_grad()
def captured(
    model: SmolLM2, ids: torch.Tensor, layers: Iterable[int], step: int
) -> dict[str, torch.Tensor]:
    """Return `smollm2.layerN.ffn_in` [T, H] and `.ffn_mid` [T, I] of every `step`-th token.

    Args:
        model: in the dtype that the result has.
        ids: [texts, tokens].
    """
    inputs = ranges_of(model, ids).inputs
    found = {}
    for layer in layers:
        x = inputs[layer][::step].contiguous()
        found[f"smollm2.layer{layer}.ffn_in"] = x
        found[f"smollm2.layer{layer}.ffn_mid"] = model.dense(layer).intermediate(x)
    return found


def main() -> None:
    model, tokenizer = smollm2.load(torch.bfloat16)
    tensors = captured(model, texts(tokenizer)[0][:TEXTS], LAYERS, STEP)
    FILE.write_bytes(lzma.compress(save(tensors), filters=_FILTERS))
    rows = {tuple(t.shape) for t in tensors.values()}
    print(f"{FILE}: {len(tensors)} tensors of {sorted(rows)}, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
