"""Expert parallelism: every rank has some of the experts, whole."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from ..kernels.moe import api as moe_api
from ..kernels.moe.backends import FUSED_MOE, MoEBackend, with_codes
from ..kernels.moe.call import Mode, MoECall
from ..reference import checks
from ..reference.moe.finalize import FinalizeOrder, finalize
from ..reference.moe.routing import Routing
from ..reference.recipe import LayerBuild
from ..reference.weights.experts import Experts
from .all_reduce import all_reduced, sum_dtype
from .all_to_all import Arrived, Exchange
from .rank_check import AgreementError, Fields, Group, described, prepare

Dispatch = Literal["all-reduce", "all-to-all"]
_OFFSET, _HELD = "local_expert_offset", "local experts"


def fused_moe_ep(
    hidden_states: torch.Tensor,
    experts: Experts,
    routing: tuple[torch.Tensor, Routing] | tuple[torch.Tensor, torch.Tensor],
    *,
    local_expert_offset: int,
    num_experts: int | None = None,
    dispatch: Dispatch = "all-to-all",
    group: dist.ProcessGroup | None = None,
    activation: Mode | None = None,
    routing_bias: torch.Tensor | None = None,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: LayerBuild = "cuda",
    nvfp4_4over6: Any = None,
    finalize_order: FinalizeOrder = "slot",
    batch_invariant: bool = False,
    output_dtype: torch.dtype = torch.bfloat16,
    reduce_dtype: torch.dtype | None = None,
    check: bool = True,
) -> torch.Tensor:
    """`fused_moe` of a layer whose experts are spread over the ranks of a group.

    Contract: with "all-to-all" each rank has tokens of its own, and gets for them what `fused_moe` of
    all experts gives in one process, to the bit: on the reference, and on Triton with
    `batch_invariant`. With "all-reduce" every rank has the same tokens; the ranks' outputs are added, in
    any order, and lie in `reference.bounds.parallel.expert_parallel_bounds`.

    Args:
        hidden_states: [T, hidden size] bf16; all-to-all: T may differ between ranks, and be 0.
        experts: the local ones, `select_experts(experts, offset, count)`: ranges in rank order that
            leave none out.
        num_experts: of all ranks; omitted, the logits' columns, or as many for each rank as are local.
        dispatch: "all-to-all", whose tokens are sent quantized (not activation="bf16"), or "all-reduce".
        group: whose ranks hold the experts; None: the default one.
        finalize_order: of this rank's tokens; "flashinfer" depends on their number.
        reduce_dtype: all-reduce: in which outputs are sent and added; None: output_dtype. FlashInfer
            writes bfloat16 alone.
        check: compare the ranks' arguments first, which waits for the GPU. Without it ranks must hold
            equally many experts, and a mismatch may end in the group's timeout; an all-reduce over NCCL
            can then be captured in a CUDA graph. An all-to-all cannot: it counts tokens on the host.
        The rest: as for `fused_moe`.

    Returns:
        [T, hidden size] of output_dtype.

    Raises:
        AgreementError: on every rank, where one has bad or other arguments.
        RuntimeError: torch.distributed's, where a rank is gone, or the group's timeout has passed.
    """

    def make() -> tuple[MoECall, Fields]:
        checks.flag("check", check)
        checks.one_of("dispatch", dispatch, get_args(Dispatch))
        checks.pair("routing", routing, "(logits, Routing) or (ids, weights)")
        checks.instance("experts", experts, Experts, "Experts, as select_experts makes them")
        _, how = routing
        everywhere = num_experts
        if everywhere is None and not isinstance(how, Routing):  # logits have a column for each
            everywhere = experts.num_local * dist.get_world_size(group)
        partial_dtype = sum_dtype(reduce_dtype, output_dtype)
        if experts.first_expert not in (None, local_expert_offset):
            raise ValueError(
                f"local_expert_offset is {local_expert_offset}; the local experts are those from "
                f"{experts.first_expert} on"
            )
        r, name = moe_api.layer_call(
            hidden_states, experts, routing, activation=activation, routing_bias=routing_bias,
            num_experts=everywhere, local_expert_offset=local_expert_offset, backend=backend,
            fast_math=fast_math, build=build, nvfp4_4over6=nvfp4_4over6,
            finalize_order=finalize_order, batch_invariant=batch_invariant, output_dtype=partial_dtype,
        )  # fmt: skip
        if dispatch == "all-to-all":
            _check_quantized(r)
            if reduce_dtype is not None:
                raise ValueError(
                    'reduce_dtype is given; dispatch "all-to-all" adds on the rank of the token, in fp32'
                )
        if not check:
            _check_even(r, dist.get_rank(group), dist.get_world_size(group))
            return r, {}
        fields = described(_unfinalized(r) if dispatch == "all-to-all" else r, name) | {
            "output_dtype": str(output_dtype),
            "reduce_dtype": str(partial_dtype),
            _OFFSET: local_expert_offset,
            _HELD: experts.num_local,
        }
        return r, fields | ({"tokens": r.tokens} if dispatch == "all-reduce" else {})

    request, every = prepare(
        f"fused_moe_ep, {dispatch}", make, group, check=check, may_differ=(_OFFSET, _HELD)
    )
    ranks = dist.get_world_size(group)
    counts = [experts.num_local] * ranks if every is None else _ranges(every)
    if dispatch == "all-reduce":
        return all_reduced(request, backend, group, output_dtype)
    return _all_to_all(request, backend, group, counts)


def _check_quantized(r: MoECall) -> None:
    if r.quantize is None or r.variant.static_only:
        raise ValueError(
            'dispatch "all-to-all" moves quantized tokens and unfinished rows; activation must be '
            '"per-token" or "static", and build not "cutlass"'
        )


def _check_even(r: MoECall, rank: int, ranks: int) -> None:
    local = r.experts.num_local
    if (r.num_experts, r.local_expert_offset) != (local * ranks, local * rank):
        raise ValueError(
            f"local_expert_offset is {r.local_expert_offset}, of {local} local experts on rank {rank} "
            f"and {r.num_experts} on {ranks}; check=False needs as many on every rank, in rank order"
        )


def _ranges(every: list[Fields]) -> list[int]:
    """Return each rank's number of experts; the ranges must hold every expert once, in rank order."""
    counts = [int(str(fields[_HELD])) for fields in every]
    end = 0
    for rank, (fields, count) in enumerate(zip(every, counts, strict=True)):
        if fields[_OFFSET] != end:
            raise AgreementError(
                f"local_expert_offset is {fields[_OFFSET]} on rank {rank}; the ranks before it hold "
                f"{end} experts"
            )
        end += count
    if end != every[0]["num_experts"]:
        raise AgreementError(f"num_experts is {every[0]['num_experts']}; the ranks hold {end}")
    return counts


def _unfinalized(r: MoECall) -> MoECall:
    """Return the call up to the rows; how they are summed later excludes no backend."""
    order: FinalizeOrder = "slot" if r.batch_invariant else "flashinfer"
    return replace(r, do_finalize=False, finalize_order=order, output_dtype=torch.bfloat16)


def _all_to_all(r: MoECall, backend: str, group: Group, counts: list[int]) -> torch.Tensor:
    name = FUSED_MOE.resolve(_unfinalized(r), backend)
    ids, weights = r.routed(name)
    exchange = Exchange.of(ids, counts, group)
    width = r.experts.hidden_size
    arrived = exchange.dispatch(with_codes(r).activations, width)
    rows = exchange.returned(_rows(r, name, arrived)[:, :width], arrived)
    return _finalized(r, name, rows, exchange.permuted, weights)


def _rows(r: MoECall, name: str, arrived: Arrived) -> torch.Tensor:
    """Return the unweighted rows [S, padded hidden size] bf16 of the slots of local experts."""
    if not arrived.token.numel():
        return arrived.activations.hidden_states.new_empty(
            (0, r.experts.padded_hidden_size), dtype=torch.bfloat16
        )
    remote = replace(
        _unfinalized(r),
        activations=arrived.activations,
        quantize=None,
        logits=None,
        routing_bias=None,
        ids=arrived.ids,
        weights=torch.ones_like(arrived.ids, dtype=torch.bfloat16),
    )
    rows, _, permuted = FUSED_MOE.serve(remote, name)
    return rows[permuted.view(arrived.ids.shape)[arrived.token, arrived.slot].long()]


def _finalized(
    r: MoECall,
    name: str,
    rows: torch.Tensor,
    permuted: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Finalize this rank's tokens, [T, hidden size], as one process does."""
    order = r.finalize_order
    if name == "reference" or FUSED_MOE.refusal("triton", r) is not None:
        # -1, a slot without an expert anywhere, reads the row of zeros, and is skipped.
        wide = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        by_slot = wide[permuted.long()].unflatten(0, weights.shape)
        is_local = permuted.view(weights.shape) >= 0
        return finalize(by_slot.float(), weights, order, is_local).to(r.output_dtype)
    from ..kernels.moe.finalize import finalize as triton_finalize

    output = rows.new_empty((r.tokens, rows.shape[1]), dtype=r.output_dtype)
    if r.tokens:
        triton_finalize(rows, permuted, weights, output, order)
    return output
