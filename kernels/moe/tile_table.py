"""The table of tiles of the two grouped GEMMs, by the slots of a local expert."""

# SPDX-License-Identifier: Apache-2.0
from ...reference.weights.experts import Experts
from ..tiles import GemmConfig
from ..triton_target import arch, native_mma, shared_memory
from .hopper.config import RingConfig, refusal_of, ring_config

Config = GemmConfig | RingConfig
Configs = tuple[Config, Config]
"""The tiles of the first and the second GEMM. They share `bn`, which is the permutation's tile."""


def gemm_config(
    slots: int,
    num_experts: int,
    columns: int,
    *,
    batch_invariant: bool = False,
    native: bool = False,
    shared: int = 227,
) -> GemmConfig:
    """Return the tiles of one GEMM, by the tokens that an expert has on average.

    The two GEMMs of a call get the same `bn`, for any number of columns. The order of a sum depends on
    `bk` and `decoded` alone; with `batch_invariant` both are always the same. The choices were measured
    on an H100 (`bench/moe_speed.py`), those with `native` on no GPU.

    Args:
        slots: slots of local experts.
        num_experts: local experts.
        columns: columns of the weights.
        native: for a GPU that multiplies codes.
        shared: KiB of shared memory (`triton_target.shared_memory`); decoded weights take 144.
    """
    each = -(-slots // num_experts)
    if native:
        if each <= 16:
            return GemmConfig(128, 16, 128, 4, 4)
        return GemmConfig(128, 64, 128, 3, 4) if each <= 64 else GemmConfig(128, 128, 128, 3, 8)
    if each <= 16:
        long = columns >= 4096 and not batch_invariant
        return GemmConfig(128, 16, 256, 3, 4) if long else GemmConfig(64, 16, 128, 4, 4)
    if each < 1024 or batch_invariant or shared < 144:
        return GemmConfig(128, 64, 128, 3, 8, registers=128)
    return GemmConfig(256, 128, 64, 4, 8, decoded=True)  # lost at 512


def local_slots(slots: int, experts: Experts, num_experts: int | None) -> int:
    """Return how many of T * K slots local experts have, if all `num_experts` have equally many."""
    return -(-slots * experts.num_local // (num_experts or experts.num_local))


def ring_serves(experts: Experts) -> bool:
    """Return True if the GEMM of `hopper/` multiplies these weights; its bits are batch-invariant."""
    return refusal_of(arch(experts.gemm1_weights.device), experts) is None


def table_configs(experts: Experts, slots: int, *, batch_invariant: bool = False) -> Configs:
    """Return `ring_config` of both GEMMs where that kernel serves, else `gemm_config`."""
    here = arch(experts.gemm1_weights.device)
    if ring_serves(experts):
        ring = ring_config(slots, experts.num_local)
        return ring, ring
    first, second = (
        gemm_config(
            slots,
            experts.num_local,
            w.shape[2] * 2,
            batch_invariant=batch_invariant,
            native=native_mma(here),
            shared=shared_memory(here),
        )
        for w in (experts.gemm1_weights, experts.gemm2_weights)
    )
    return first, second
