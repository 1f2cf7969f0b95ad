"""The decode scales of FP8 weights, as checkpoints have them beside a matrix of e4m3 [rows, K].

    one for all     [], [1], [1, 1]                     ModelOpt, compressed-tensors
    one a row       [rows], [rows, 1]                   compressed-tensors, FBGEMM
    blocks          [rows / n, K / k], both rounded up  DeepSeek-V3: 128x128
    blocks of 32    [rows, K / 32]                      MXFP8

They are fp32, bf16 or fp16, or e8m0, as F8_E8M0 or as its bytes (DeepSeek-V3.1): 2^(byte - 127), 255 is
NaN. Stacked tensors have the experts first. The kind is `weight_scale_inv`, `weight_scale` or `scale`;
despite the first name all of them multiply. Value: e4m3 * scale in fp32, rounded once to bf16.
"""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .check import Headers
from .folder import Folder
from .layers import Layer, Projection
from .locations import Place, read_matrix, read_scalar, read_vector, rows_of

KINDS = ("weight_scale_inv", "weight_scale", "scale")
BLOCK = (128, 128)
_MX = (1, 32)
_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def find_scale(layer: Layer, expert: int, projection: Projection) -> Place | None:
    """Return the place of a projection's scales; None if it has none."""
    places = (layer.place(expert, projection, kind) for kind in KINDS)
    return next((place for place in places if place is not None), None)


def check_scale(
    check: Headers, place: Place, rows: int, columns: int, block: Sequence[int]
) -> None:
    """Tell what is wrong with the header of scales.

    Args:
        rows: of the matrix; of a fused one, of each half.
        block: rows and columns of a block, as the checkpoint describes it.
    """
    info = check.folder.info(place.name)
    shapes = [*check.scalars(place), *check.vector(place, rows), *check.whole(place, rows, 1)]
    fused, total = _fused(place, rows)
    for n, k in _blocks(block):
        apart = check.whole(place, -(-rows // n), -(-columns // k))
        if fused != place and rows % n and info is not None and info.shape in apart:
            check.add(f"{place.name}: gate and up, of {rows} rows each, share an FP8 block of {n}")
        shapes += apart + check.whole(fused, -(-total // n), -(-columns // k))
    check.fits(place, _DTYPES, list(dict.fromkeys(shapes)))


def read_scale(
    folder: Folder, place: Place, rows: int, columns: int, block: Sequence[int]
) -> torch.Tensor:
    """Read the scales: [rows, columns] fp32, or a shape that broadcasts to it. They were checked before.

    Blocks of a fused matrix may hold rows of both halves, as they do where gate and up alternate.
    """
    info = folder.info(place.name)
    assert info is not None, "checked before"
    own = info.shape[0 if place.expert is None or place.flat else 1 :]
    if math.prod(own) <= (1 if place.half is None else 2):
        return _fp32(read_scalar(folder, place))
    if len(own) == 1:
        return _fp32(read_vector(folder, place))[:, None]
    fused, total = _fused(place, rows)
    scales = _fp32(read_matrix(folder, fused))
    if scales.shape == (total, 1):
        return scales[rows_of(place, total)]
    for n, k in _blocks(block):
        if scales.shape == (-(-total // n), -(-columns // k)):
            by_row = scales.repeat_interleave(n, 0)[rows_of(place, total)]
            return by_row.repeat_interleave(k, 1)[:, :columns]
    raise AssertionError("checked before")


def _fused(place: Place, rows: int) -> tuple[Place, int]:
    """Return the place of all rows of a fused matrix, and their number."""
    return (place, rows) if place.half is None else (replace(place, half=None), 2 * rows)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply e4m3 [rows, K] by fp32 scales that broadcast to it, and round once to bf16."""
    return (weight.float() * scale).bfloat16()


def _blocks(block: Sequence[int]) -> list[tuple[int, int]]:
    return list(dict.fromkeys([(block[0], block[1]), BLOCK, _MX]))


def _fp32(scale: torch.Tensor) -> torch.Tensor:
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()
