"""Maps of differences between two outputs, as counts in tiles: a wrong layout shows as a pattern."""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..reference.recipe import SfLayout
from .results import Heat

_STORED = {SfLayout.layout_128x4: (128, 4, 32, 16), SfLayout.layout_8x4: (8, 4, 8, 4)}
"""(rows, columns) of scales in a tile, and the rows and columns that its bytes are drawn in."""
_COLUMNS = 16


def of_block_scales(different: torch.Tensor, layout: SfLayout) -> Heat:
    """The map of different block scales: a bool buffer [padded M, padded K/16], as it lies in memory."""
    what = f"block scales, {layout.name}"
    if layout not in _STORED:
        return _of_matrix(different, what, (8, 4))
    rows, columns, drawn_rows, drawn_columns = _STORED[layout]
    m, k = different.shape
    tiles = different.reshape(m // rows, k // columns, rows * columns).int()
    within = tiles.sum((0, 1)).view(drawn_rows, drawn_columns)
    return Heat(what, tiles.sum(-1).tolist(), within.tolist())


def of_output(different: torch.Tensor) -> Heat:
    """The map of different outputs: bool [T, H], in tiles of one token."""
    return _of_matrix(different, "output, tokens x 16 columns", (1, _COLUMNS))


def _of_matrix(different: torch.Tensor, what: str, tile: tuple[int, int]) -> Heat:
    """Tiles of a row-major matrix, the last ones filled up."""
    (rows, columns), (m, k) = tile, different.shape
    full = torch.nn.functional.pad(different.int(), (0, -k % columns, 0, -m % rows))
    tiles = full.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return Heat(what, tiles.sum((1, 3)).tolist(), tiles.sum((0, 2)).tolist())
