"""Tensor parallelism: every rank has a shard of every expert's intermediate."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.moe import api as moe_api
from ..kernels.moe.backends import MoEBackend
from ..kernels.moe.call import Mode, MoECall
from ..reference import checks
from ..reference.moe.finalize import FinalizeOrder
from ..reference.moe.routing import Routing
from ..reference.recipe import LayerBuild
from ..reference.weights.experts import Experts
from .all_reduce import all_reduced, sum_dtype
from .rank_check import AgreementError, Fields, described, prepare

_BIAS = "gemm2_bias"
_SHARD = "shard"


def fused_moe_tp(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    activation: Mode | None = None,
    routing_bias: torch.Tensor | None = None,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = None,
    finalize_order: FinalizeOrder = "flashinfer",
    batch_invariant: bool = False,
    output_dtype: torch.dtype = torch.bfloat16,
    reduce_dtype: torch.dtype | None = None,
    check: bool = True,
) -> torch.Tensor:
    """`fused_moe` of a shard of the intermediate on each rank, all-reduced.

    Contract: each rank computes `fused_moe` of its shard, to the bit; the sum is that of
    `reference.moe.shards.fused_moe_shards` with as many shards, up to the order of additions, and lies
    in `reference.bounds.parallel.tensor_parallel_bounds`. It is not `fused_moe` of the whole experts:
    each shard quantizes its intermediate by its own row maximum.

    Args:
        hidden_states: [T, hidden size] bf16, the same on every rank, as is the routing.
        experts: `shard_experts(experts, rank, ranks)`.
        group: whose ranks hold the shards, in rank order; None: the default one.
        reduce_dtype: in which outputs are sent and added; None: output_dtype. FlashInfer writes
            bfloat16 alone.
        check: compare the ranks' arguments first, which waits for the GPU. Without it a mismatch may
            end in the group's timeout; with NCCL the call can then be captured in a CUDA graph.
        The rest: as for `fused_moe`.

    Returns:
        [T, hidden size] of output_dtype, on every rank.

    Raises:
        AgreementError: on every rank, where one has bad or other arguments, or another's shard.
        RuntimeError: torch.distributed's, where a rank is gone, or the group's timeout has passed.
    """

    def make() -> tuple[MoECall, Fields]:
        checks.flag("check", check)
        r, name = moe_api.layer_call(
            hidden_states,
            experts,
            routing,
            activation=activation,
            routing_bias=routing_bias,
            backend=backend,
            fast_math=fast_math,
            build=build,
            nvfp4_4over6=nvfp4_4over6,
            finalize_order=finalize_order,
            batch_invariant=batch_invariant,
            output_dtype=sum_dtype(reduce_dtype, output_dtype),
        )
        if not check:
            return r, {}
        return r, described(r, name) | {
            "tokens": r.tokens,
            "local experts": experts.num_local,
            "scalars of the weights": _digest(experts),
            "output_dtype": str(output_dtype),
            "reduce_dtype": str(r.output_dtype),
            _BIAS: experts.gemm2_bias is not None,
            _SHARD: "{} of {}".format(*experts.shard),
        }

    request, every = prepare("fused_moe_tp", make, group, check=check, may_differ=(_BIAS, _SHARD))
    if every is not None:
        for rank, fields in enumerate(every):
            if fields[_SHARD] != (wanted := f"{rank} of {len(every)}"):
                raise AgreementError(
                    f"rank {rank} holds shard {fields[_SHARD]}; it must be "
                    f"shard_experts(experts, {wanted.replace(' of ', ', ')})"
                )
        holders = [rank for rank, fields in enumerate(every) if fields[_BIAS]]
        if len(holders) > 1:
            raise AgreementError(
                f"{_BIAS} is held by ranks {', '.join(map(str, holders))}; it is added once, by the "
                "rank that shard_experts gives it to"
            )
    return all_reduced(request, backend, group, output_dtype)


def _digest(e: Experts) -> int:
    """Digest the scalars; ranks have equal digests if weights were quantized before they were cut."""
    scalars = (e.output1_scale_scalar, e.output1_scale_gate_scalar, e.output2_scale_scalar)
    place = torch.arange(
        1, 3 * e.num_local + 1, dtype=torch.int64, device=e.output2_scale_scalar.device
    )
    bits = torch.cat(scalars).view(torch.int32).long()
    return int((bits * place).sum().item())
