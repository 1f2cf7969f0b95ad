"""The arrangement of a layer's stacked tensors, found from their shapes.

[E, rows, columns]      the usual one
[E, columns, rows]      transposed: Llama 4 and GPT-OSS in transformers
[E * rows, columns]     flattened: llm-compressor of 3-D parameters
"""

# SPDX-License-Identifier: Apache-2.0
from .folder import Folder
from .layers import WEIGHTS, Layer
from .model_config import config_value

_OF_ROWS = (*WEIGHTS, "weight_scale", "weight_scale_inv", "scale", "bias")


def settle(folder: Folder, layer: Layer) -> None:
    """Find out which stacked tensors of a layer are flattened, and whether they are transposed."""
    shapes: dict[str, tuple[int, ...]] = {}
    packed = 1
    for (expert, projection, kind), name in layer.names.items():
        info = folder.info(name) if expert is None and kind in _OF_ROWS else None
        if info is None:
            continue
        rank = len(info.shape) + (kind == "bias")
        if rank == 2 and info.shape[0] > layer.num_experts:
            layer.flat.add(name)
        if kind in WEIGHTS and rank == 3:
            shapes[projection] = info.shape[1:]
            packed = 2 if info.dtype == "U8" else 1
    first = next((p for p in ("fused", "gate", "up") if p in shapes), None)
    if first is not None and "down" in shapes:
        fused = 2 if first == "fused" else 1
        hidden = config_value(folder, "hidden_size")
        layer.transposed = _transposed(shapes[first], shapes["down"], fused, packed, hidden)


def _transposed(
    first: tuple[int, ...], down: tuple[int, ...], fused: int, packed: int, hidden: object
) -> bool:
    """True if two stacks are [columns, rows].

    The GEMMs share H and I, so the shapes fit together one way alone, unless nothing is fused or packed:
    then the configuration's hidden size decides, and without it the usual order.
    """
    a, b = first
    usual = down == (b * packed, a // fused // packed)
    turned = down == (b // fused // packed, a * packed)
    if usual and turned:
        return a == hidden != b
    return turned
