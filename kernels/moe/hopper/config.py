"""The tiles of the grouped GEMM for sm_90, and which Triton compiles it."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import triton

from ....reference.weights.experts import Experts
from ...triton_target import triton_version

_VERSIONS = ((3, 6), (3, 7))
"""The versions of Triton whose Gluon compiles the kernel as `tests/moe/test_hopper_offline.py` asks; 3.6
ran it on a GPU."""


WIDEST_SHARED = 160
"""Tokens of the widest tile that two programs share in the dense GEMM: ptxas spills wider ones' sums."""


@dataclass(frozen=True)
class RingConfig:
    """The tiles of the grouped GEMM or the dense one for sm_90, and how it is launched."""

    widths: tuple[int, ...]  # tokens of a tile, from the widest: an expert's last tile is narrower;
    # each is a power of two or a sum of some. ptxas serializes the wgmma of too many wide ones.
    stages: int  # of the ring in shared memory
    groups: int  # of 128 columns, in a stage
    programs: int  # on a multiprocessor at a time
    gathers: bool = False  # the rows of tokens; otherwise one is written for each expert of a token
    ahead: bool = False  # the grouped GEMM loads a stage's codes before it decodes the first. ptxas
    # serializes the wgmma of some tiles that do so.
    rows: int = 128  # of weights in a tile, or 64, which the dense GEMM alone takes

    @property
    def bn(self) -> int:
        """Return the tokens of the widest tile, for which the permutation is made."""
        return self.widths[0]

    @property
    def box(self) -> int:
        """Return the tokens that TMA brings at a time: the smallest part of a width."""
        return min(width & -width for width in self.widths)

    @property
    def registers(self) -> int:
        """Return a thread's registers at launch: 12 warps share 65,536, or the 8 of a half tile 32,768.

        The producer has four warps' registers, and gives most of them away.
        """
        if self.rows == 64:
            return 128
        return 168 if self.programs == 1 else 80

    @property
    def warps(self) -> int:
        """Return the warps that multiply, 16 rows of weights each."""
        return self.rows // 16


_BY_ROWS = (
    (2, RingConfig((8,), 5, 2, 2, ahead=True)),
    (12, RingConfig((16, 8), 4, 2, 2)),
    (24, RingConfig((32, 16), 3, 2, 2)),
    (48, RingConfig((64, 32, 16), 4, 2, 1, ahead=True)),
    (72, RingConfig((96, 64, 32), 3, 2, 1, ahead=True)),
    (152, RingConfig((160, 128, 96, 32), 4, 1, 1)),
)
_WIDE = RingConfig((256, 128, 64, 32), 3, 1, 1, gathers=True)
CONFIGS = (*(config for _, config in _BY_ROWS), _WIDE)
"""Every configuration that `ring_config` chooses."""


def ring_config(slots: int, num_experts: int) -> RingConfig:
    """Return the tiles for as many slots of as many local experts, by the rows that an expert has."""
    each = -(-slots // num_experts)
    return next((config for most, config in _BY_ROWS if each <= most), _WIDE)


def gathers(config: RingConfig, rows: int, columns: int) -> bool:
    """Return True if the layer's first GEMM gathers the rows of [rows, columns] of tokens.

    It counts eights of columns in 32 bits.
    """
    return config.gathers and rows * columns < 2**34


def refusal(arch: int) -> str | None:
    """Return why the kernel does not serve on a GPU of this ARCH here, or None."""
    if arch != 90:
        return f"the GPU is sm_{arch}, and the kernel is for sm_90"
    if triton_version() not in _VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in _VERSIONS)
        return f"Triton is {triton.__version__}, and Gluon's kernel was tested with {known}"
    return None


def refusal_of(arch: int, experts: Experts) -> str | None:
    """Return why the kernel does not multiply these weights on a GPU of this ARCH here, or None."""
    weights = (
        experts.gemm1_weights, experts.gemm1_weights_scale,
        experts.gemm2_weights, experts.gemm2_weights_scale,
    )  # fmt: skip
    # Meta tensors, of which `explain` is asked, have no addresses.
    if any(not w.is_meta and w.data_ptr() % 16 for w in weights):
        return "the weights do not begin at a multiple of 16 bytes, which TMA needs"
    return refusal(arch)
