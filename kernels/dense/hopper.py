"""The dense product on sm_90 by the GEMM of `moe/hopper/`: the calls that it serves, and its tiles."""

# SPDX-License-Identifier: Apache-2.0
import math

from ..launcher import cdiv
from ..moe.hopper import config
from ..moe.hopper.config import WIDEST_SHARED, RingConfig

_BY_WIDTH = {c.bn: c for c in config.CONFIGS}
"""The configurations of the grouped GEMM, by the tokens of their widest tile."""
_FEW = tuple((width, _BY_WIDTH[width]) for width in (8, 16, 32))
"""The tiles of so many rows at most, which are read at the speed of memory."""
_MANY = (
    (1.0, _BY_WIDTH[256]),
    (0.65, RingConfig((128, 64, 32), 4, 1, 1)),
    (0.45, _BY_WIDTH[64]),
    (0.83, _BY_WIDTH[160]),
    (0.62, _BY_WIDTH[96]),
)
"""The tiles of more rows, and the time of a tile over that of the widest, as the grouped GEMM has it.

Those of 160 and 96 tokens follow from the grouped GEMM's cost model, which a second part of the sums is
in (docs/hopper_gluon.md).
"""
HALVES = (
    RingConfig((8,), 8, 2, 1, rows=64),
    RingConfig((16,), 7, 2, 1, rows=64),
    RingConfig((32,), 5, 2, 1, rows=64),
    RingConfig((64,), 4, 2, 1, rows=64),
    RingConfig((128,), 5, 1, 1, rows=64),
)
"""Half tiles, of 64 rows of b: up to 128 rows of a, where each has a multiprocessor of its own."""
CONFIGS = (*(c for _, c in _FEW), *(c for _, c in _MANY))
"""Every configuration of whole tiles that `ring_config` chooses."""
_ROWS = 128  # rows of b in a whole tile
_SCALES = 64  # columns of a tile of block scales in 128x4


def refusal(arch: int, k: int) -> str | None:
    """Return why the GEMM does not multiply by K columns on a GPU of this ARCH here, or None."""
    if (reason := config.refusal(arch)) is not None:
        return reason
    if k % _SCALES:
        return f"K is {k}; it must be a multiple of {_SCALES}, as a tile of block scales"
    return None


def ring_config(m: int, n: int, multiprocessors: int) -> RingConfig:
    """Return the tiles of [m, K] times [K, n]: a sum's order is the same with all of them."""
    for half in HALVES if m <= 128 else ():  # more rows were not timed
        if half.bn >= min(m, 32) and cdiv(n, half.rows) * cdiv(m, half.bn) <= multiprocessors:
            return half
    for most, few in _FEW:
        if m <= most:
            return few

    def time(choice: tuple[float, RingConfig]) -> float:
        each = cdiv(n, _ROWS) * cdiv(m, choice[1].bn) / multiprocessors
        shared = choice[1].bn <= WIDEST_SHARED
        return (max(1.0, each) if shared else math.ceil(each)) * choice[0]

    return min(_MANY, key=time)[1]
