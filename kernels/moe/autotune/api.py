"""`autotune_fused_moe`, the public function that measures tiles: it checks a layer as a call does."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ....reference import checks
from ....reference.weights.experts import Experts
from ...backends import UnsupportedError
from ..api import layer_call
from ..backends import FUSED_MOE
from ..call import Mode

if TYPE_CHECKING:
    from .search import Tuning


def autotune_fused_moe(
    experts: Experts,
    tokens: int | Iterable[int],
    top_k: int,
    *,
    activation: Mode = "per-token",
    num_experts: int | None = None,
    local_expert_offset: int = 0,
) -> "list[Tuning]":
    """Measure the Triton backend's GEMM configurations on this GPU, and keep the fastest on disk.

    Later calls of the same layer, in this process and in those that start afterwards, use them, and
    others those of a table; no call measures by itself. A result serves a GPU model, a Triton version,
    the kernels' source, and all that a layer's kernels depend on; and counts of slots T * K up to the
    next power of two, from above the one before. Measured again, it is replaced. Of
    `batch_invariant=True` nothing is tuned: the bits of such calls must not depend on files. Those of
    other calls then do: another order of the two sums moves their last bits.

    Every candidate's rows are compared with those of the table's choice: the same bits where the order
    of sums is the same, else a row is at most 2^-7 of its norm apart. Nothing else may run on the GPU.

    Args:
        experts: on the GPU; what their values are does not matter to the times.
        tokens: counts T; of several in a bucket the largest is measured.
        top_k: K, of tokens spread evenly over all experts.
        activation: as for `fused_moe`.
        num_experts: of all ranks; omitted, the local ones.
        local_expert_offset: the first local expert.

    Returns:
        One `Tuning` a bucket: candidates, microseconds, choice; `print` shows it.

    Raises:
        ValueError, TypeError: an argument that `fused_moe` would not accept.
        UnsupportedError: the experts are not on a GPU that the Triton backend runs on.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    counts = [tokens] if isinstance(tokens, int | str) else tokens
    checks.instance("tokens", counts, Iterable, "an integer or several")  # type: ignore[type-abstract]
    counts = list(counts)
    for count in counts:
        checks.integer("tokens", count, 1)
    all_experts = experts.num_local if num_experts is None else num_experts
    checks.integer("num_experts", all_experts, experts.num_local)
    checks.integer("top_k", top_k, 1, all_experts)
    like = experts.gemm1_weights
    empty = like.new_empty((0, top_k), dtype=torch.int32), like.new_empty((0, top_k)).bfloat16()
    states = like.new_empty((0, experts.hidden_size), dtype=torch.bfloat16)
    call, _ = layer_call(
        states,
        experts,
        empty,
        activation=activation,
        num_experts=all_experts,
        local_expert_offset=local_expert_offset,
        finalize_order="slot",
    )
    if call.capability is None:
        raise UnsupportedError(f"experts are on the {like.device.type}; only a GPU can be measured")
    if (reason := FUSED_MOE.refusal("triton", call)) is not None:
        raise UnsupportedError(f"backend triton cannot serve this layer: {reason}")
    from .search import autotune

    return autotune(call, counts, top_k)
