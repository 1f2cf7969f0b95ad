"""Cases for the ranks of a group; `parallel_worker.py` is one rank, `test_parallel.py` starts them.

A case is a function of `Rank` that every rank calls: it raises AssertionError where this one sees
something wrong.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import moe_cases
import pytest
import torch
import torch.distributed as dist
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.cases.moe_case import to_device
from nvfp4_moe.parallel import AgreementError, fused_moe_ep, fused_moe_tp
from nvfp4_moe.parallel import select_experts as select
from nvfp4_moe.parallel import shard_experts as shard
from nvfp4_moe.parallel.all_to_all import packed_bytes
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.parallel import expert_parallel_bounds, tensor_parallel_bounds
from nvfp4_moe.reference.moe.layer import fused_moe as reference_fused_moe
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.moe.shards import fused_moe_shards
from nvfp4_moe.reference.recipe import NVFP44Over6Config
from nvfp4_moe.reference.weights.prepare import prepare_experts

SHAPE = Shape(13, 144, 112, 9, 5)
"""Padded in H and in I, 7 blocks of I and 9 experts: uneven on 2 and on 4 ranks."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Rank:
    rank: int
    ranks: int
    group: dist.ProcessGroup
    device: torch.device
    backend: str  # of the layer

    @property
    def options(self) -> dict[str, Any]:
        return {"backend": self.backend, "batch_invariant": True}

    def ep(self, case: moe_cases.Case, dispatch: str, tokens: slice | None = None, **given):
        """`fused_moe_ep` of some tokens of a case, this rank holding its part of the experts."""
        first, count = given.pop("local", None) or self.local(case.experts.num_local)
        tokens = tokens or slice(None)
        routing = given.pop("routing", (case.ids[tokens], case.weights[tokens]))
        given = {"num_experts": case.experts.num_local, "group": self.group} | given
        return fused_moe_ep(
            case.x[tokens].to(self.device),
            to_device(select(case.experts, first, count), self.device),
            self.placed(routing),
            local_expert_offset=first,
            dispatch=dispatch,
            **self.options | given,
        )

    def tp(self, case: moe_cases.Case, experts=None, **given):
        """`fused_moe_tp` of a case, with this rank's shard."""
        experts = experts or shard(case.experts, self.rank, self.ranks)
        return fused_moe_tp(
            case.x.to(self.device),
            to_device(experts, self.device),
            self.placed((case.ids, case.weights)),
            group=self.group,
            **self.options | given,
        )

    def one_process(self, case: moe_cases.Case, tokens: slice | None = None, **given):
        """Call the whole layer in one process."""
        tokens = tokens or slice(None)
        routing = given.pop("routing", (case.ids[tokens], case.weights[tokens]))
        experts = given.pop("experts", case.experts)
        return nvfp4_moe.fused_moe(
            case.x[tokens].to(self.device),
            to_device(experts, self.device),
            self.placed(routing),
            **self.options | given,
        )

    def placed(self, routing):
        return tuple(to_device(part, self.device) for part in routing)

    def local(self, experts: int) -> tuple[int, int]:
        """(first, count) of this rank's experts."""
        counts = self.counts(experts)
        return sum(counts[: self.rank]), counts[self.rank]

    def counts(self, experts: int) -> list[int]:
        """The first ranks have one more."""
        return [experts // self.ranks + (r < experts % self.ranks) for r in range(self.ranks)]

    def mine(self, tokens: int) -> slice:
        """This rank's tokens; the last has none."""
        each = -(-tokens // (self.ranks - 1))
        return slice(self.rank * each, min((self.rank + 1) * each, tokens))


CASES: dict[str, Callable[[Rank], None]] = {}


def case(f: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CASES[f.__name__] = f
    return f


def biased(kind: ActivationType = ActivationType.Swiglu, shape: Shape = SHAPE, **options):
    """A layer with both biases; some slots have no expert at all."""
    g = torch.Generator().manual_seed(3)
    rows = shape.intermediate * (2 if kind.gated else 1)
    made = moe_cases.make(
        shape,
        kind,
        w13_bias=torch.randn(shape.experts, rows, generator=g),
        w2_bias=torch.randn(shape.experts, shape.hidden, generator=g),
        **options,
    )
    ids = made.ids.clone()
    ids[::4, 1] = -1
    return replace(made, ids=ids)


def agree_on_refusing(r: Rank, match: str, call: Callable[[], Any]) -> None:
    """Every rank raises, and each can tell why; then the group still works."""
    with pytest.raises(AgreementError, match=match):
        call()
    total = torch.ones(1, device=r.device)
    dist.all_reduce(total, group=r.group)
    assert total.item() == r.ranks


@case
def all_to_all_is_one_process(r: Rank) -> None:
    logits = torch.randn(13, 9, generator=torch.Generator().manual_seed(8))
    deepseek = Routing(RoutingMethodType.DeepSeekV3, 5, routed_scaling_factor=2.5)
    configs: list[tuple[dict, dict]] = [
        ({}, {}),
        ({"weights_dtype": torch.float32}, {"output_dtype": torch.float32}),
        ({}, {"nvfp4_4over6": NVFP44Over6Config(256, "MSE"), "fast_math": False}),
        ({"mode": "static"}, {"activation": "static", "output_dtype": torch.float16}),
        ({}, {"routing": deepseek}),
    ]
    tokens = r.mine(SHAPE.tokens)
    for made, given in configs:
        layer = biased(**made)
        if "routing" in given:
            given = {"routing": (logits[tokens], deepseek)}
        got = r.ep(layer, "all-to-all", tokens, **given)
        assert_bitwise(got, r.one_process(layer, tokens, **given), f"{made} {given}")
        if "routing" not in given:  # a token's bits do not depend on the others
            assert_bitwise(got, r.one_process(layer, **given)[tokens], f"{made} {given}, of all")


@case
def slots_of_no_expert_add_nothing(r: Rank) -> None:
    """Ids of -1 with weights of NaN and infinity; on a rank, so are ids of another rank's experts."""
    layer, tokens = biased(), r.mine(SHAPE.tokens)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(layer.weights)
    weights = torch.where(layer.ids < 0, strange.repeat(22)[:65].view(13, 5), layer.weights)
    odd = replace(layer, weights=weights)
    for order in ("slot", "flashinfer")[: 2 if r.backend == "reference" else 1]:
        given = {"finalize_order": order, "batch_invariant": order == "slot"}
        got = r.ep(odd, "all-to-all", tokens, **given)
        assert_bitwise(got, r.one_process(layer, tokens, **given), order)
    assert r.ep(odd, "all-reduce").isfinite().all()


@case
def all_to_all_in_flashinfers_order(r: Rank) -> None:
    """The order of the finalize shows in fp32, and is that of this rank's own number of tokens."""
    if r.backend != "reference":
        return  # batch_invariant has the order of slots
    layer, tokens = biased(weights_dtype=torch.float32), r.mine(SHAPE.tokens)
    by_order = {}
    for order in ("slot", "flashinfer"):
        given = {"output_dtype": torch.float32, "finalize_order": order, "batch_invariant": False}
        by_order[order] = r.ep(layer, "all-to-all", tokens, **given)
        assert_bitwise(by_order[order], r.one_process(layer, tokens, **given), order)
    if r.rank < r.ranks - 1:
        assert not torch.equal(by_order["slot"], by_order["flashinfer"])


@case
def all_to_all_of_no_tokens(r: Rank) -> None:
    got = r.ep(moe_cases.make(SHAPE), "all-to-all", slice(0, 0))
    assert got.shape == (0, SHAPE.hidden) and got.dtype == torch.bfloat16


@case
def another_ranks_experts_show(r: Rank) -> None:
    """Ranges that fit together, weights that do not: no header has those, the bits do."""
    layer, tokens = moe_cases.make(SHAPE), r.mine(SHAPE.tokens)
    rolled = replace(layer, experts=prepare_experts(layer.w13.roll(1, 0), layer.w2.roll(1, 0)))
    got = r.ep(rolled, "all-to-all", tokens)
    if got.numel():
        assert not torch.equal(got, r.one_process(layer, tokens))


@case
def what_is_sent(r: Rank) -> None:
    """Bytes between ranks: 0.5625 an element, a scale and the ids of a token; rows back in bf16."""
    layer, sent = moe_cases.make(SHAPE), []
    original = dist.all_to_all_single

    def counting(output, given, output_splits=None, input_splits=None, **rest):
        row = given[:1].numel() * given.element_size() if given.dim() > 1 else given.element_size()
        splits = input_splits or [1] * r.ranks
        sent.append(row * sum(n for to, n in enumerate(splits) if to != r.rank))
        return original(output, given, output_splits, input_splits, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        tokens = r.mine(SHAPE.tokens)
        r.ep(layer, "all-to-all", tokens)
    first, count = r.local(SHAPE.experts)
    here = (layer.ids >= first) & (layer.ids < first + count)
    mine = layer.ids[tokens]
    bounds = torch.tensor(r.counts(SHAPE.experts)).cumsum(0)
    owner = torch.searchsorted(bounds, mine.long(), right=True)
    tokens_out = sum(int((owner == to).any(1).sum()) for to in range(r.ranks) if to != r.rank)
    rows_out = int(here.sum() - here[tokens].sum())
    assert packed_bytes(SHAPE.hidden, SHAPE.top_k) == 0.5625 * SHAPE.hidden + 4 + 4 * SHAPE.top_k
    assert sent == [
        8 * (r.ranks - 1),
        tokens_out * packed_bytes(SHAPE.hidden, SHAPE.top_k),
        rows_out * SHAPE.hidden * 2,
    ]


@case
def all_reduce_of_experts(r: Rank) -> None:
    layer, counts = biased(), r.counts(SHAPE.experts)
    for dtype in DTYPES:
        given = {"reduce_dtype": dtype, "output_dtype": torch.float16}
        got = r.ep(layer, "all-reduce", **given).cpu()
        allowed = expert_parallel_bounds(
            layer.activations,
            layer.experts,
            layer.ids,
            layer.weights,
            counts,
            finalize_order="slot",
            **given,
        )
        assert_inside(got, allowed, f"{dtype}")
        if r.ranks == 2 and r.backend == "reference":  # two outputs have one sum
            assert_bitwise(got, sum_of_parts(layer, counts, dtype).half(), f"{dtype}")
        without = sum_of_parts(layer, counts[:-1], dtype).half()
        assert not allowed.contains(without).all(), "a rank's part may be missing"


def sum_of_parts(layer: moe_cases.Case, counts: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The outputs of ranks that hold so many experts, added in rank order."""
    total, first = torch.zeros((), dtype=dtype), 0
    for count in counts:
        total = (
            total
            + reference_fused_moe(
                layer.activations,
                select(layer.experts, first, count),
                layer.ids,
                layer.weights,
                local_expert_offset=first,
                finalize_order="slot",
                output_dtype=dtype,
            ).output
        )
        first += count
    return total


@case
def shards(r: Rank) -> None:
    """Each rank has its shard's output, to the bit, and all the sum of them."""
    for kind in (ActivationType.Swiglu, ActivationType.Relu2):
        layer = biased(kind)
        routed = (layer.activations, layer.experts, layer.ids, layer.weights)
        for dtype in DTYPES:
            given = {"reduce_dtype": dtype, "output_dtype": torch.bfloat16}
            want = fused_moe_shards(*routed, tp_shards=r.ranks, finalize_order="slot", **given)
            allowed = tensor_parallel_bounds(*routed, r.ranks, finalize_order="slot", **given)
            got = r.tp(layer, **given).cpu()
            assert_inside(got, allowed, f"{kind.name} {dtype}")
            if r.backend != "reference":
                continue
            own = r.one_process(
                layer, experts=shard(layer.experts, r.rank, r.ranks), output_dtype=dtype
            )
            assert_bitwise(own, want.shards[r.rank].output, f"{kind.name} {dtype}: this shard")
            if r.ranks == 2:
                assert_bitwise(got, want.output, f"{kind.name} {dtype}: the sum")
        unsharded = r.one_process(layer).cpu()
        assert not allowed.contains(unsharded).all(), "several shards are not one"


@case
def weights_cut_before_they_are_quantized(r: Rank) -> None:
    """Each rank's own maxima give scalars that differ, which the headers show."""
    layer = moe_cases.make(SHAPE)
    blocks = layer.w13.unflatten(1, (2, -1, 16))
    part = slice(r.rank, r.rank + 1)
    own = prepare_experts(blocks[:, :, part].flatten(1, 3), layer.w2[..., r.rank * 16 :][..., :16])
    own = replace(
        shard(layer.experts, r.rank, r.ranks),
        output1_scale_scalar=own.output1_scale_scalar,
        output1_scale_gate_scalar=own.output1_scale_gate_scalar,
        output2_scale_scalar=own.output2_scale_scalar,
    )
    agree_on_refusing(r, "scalars of the weights is .* on 0.* on 1", lambda: r.tp(layer, own))


@case
def bias_on_every_rank(r: Rank) -> None:
    layer = biased()
    own = replace(
        shard(layer.experts, r.rank, r.ranks), gemm2_bias=shard(layer.experts, 0, 2).gemm2_bias
    )
    agree_on_refusing(r, "gemm2_bias is held by ranks 0, 1", lambda: r.tp(layer, own))


@case
def wrong_offsets(r: Rank) -> None:
    layer = moe_cases.make(SHAPE)
    for dispatch in ("all-to-all", "all-reduce"):
        agree_on_refusing(
            r,
            "local_expert_offset is 0 on rank 1; the ranks before it hold 4",
            lambda dispatch=dispatch: r.ep(layer, dispatch, local=(0, 4)),
        )
    mine = (4 * r.rank, 4) if r.rank < 2 else (8, 1)
    if r.ranks == 2:
        agree_on_refusing(
            r, "num_experts is 9; the ranks hold 8", lambda: r.ep(layer, "all-to-all", local=mine)
        )


@case
def one_rank_differs(r: Rank) -> None:
    """In H, K, T, a dtype, an option, the call itself; the others can tell which rank and how."""
    odd, layer = r.rank == 1, moe_cases.make(SHAPE)
    wide = moe_cases.make(replace(SHAPE, hidden=160))
    ids, weights = (t[:, :4].contiguous() for t in (layer.ids, layer.weights))
    fewer = replace(layer, ids=ids, weights=weights)
    short = slice(0, 12) if odd else None
    exact = replace(layer, weights=layer.weights.float())
    half = replace(layer, x=layer.x.half())
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("hidden_size is 144 on 0.*, 160 on 1", lambda: r.ep(wide if odd else layer, "all-to-all")),
        ("hidden_size is 144 on 0.*, 160 on 1", lambda: r.tp(wide if odd else layer)),
        ("top_k is 5 on 0.*, 4 on 1", lambda: r.ep(fewer if odd else layer, "all-to-all")),
        ("tokens is 13 on 0.*, 12 on 1", lambda: r.ep(layer, "all-reduce", short)),
        ("routing weights is .*", lambda: r.ep(exact if odd else layer, "all-to-all")),
        (
            "rank 1: ValueError: hidden_states is float16",
            lambda: r.ep(half if odd else layer, "all-to-all"),
        ),
        (
            "reduce_dtype is .*float32 on 0.*, .*float16 on 1",
            lambda: r.tp(layer, reduce_dtype=torch.float16 if odd else torch.float32),
        ),
        (
            "call is fused_moe_tp on 0.*, fused_moe_ep, all-reduce on 1",
            lambda: r.ep(layer, "all-reduce") if odd else r.tp(layer),
        ),
        (
            "rank 1: UnsupportedError: backend flashinfer:trtllm cannot serve",
            lambda: r.tp(layer, **({"backend": "flashinfer:trtllm"} if odd else {})),
        ),
        ("rank 1: ValueError: dispatch is 'x'", lambda: r.ep(layer, "x" if odd else "all-reduce")),
        (
            "rank 1: ValueError: reduce_dtype is torch.int8; it must be",
            lambda: r.tp(layer, reduce_dtype=torch.int8 if odd else None),
        ),
        (
            "rank 1: ValueError: output_dtype is torch.float64; it must be",
            lambda: r.tp(layer, output_dtype=torch.float64 if odd else torch.float32),
        ),
    ]
    for match, call in calls:
        agree_on_refusing(r, match, call)


@case
def bf16_tokens_are_not_sent(r: Rank) -> None:
    layer = moe_cases.make(SHAPE)
    agree_on_refusing(r, "activation must be", lambda: r.ep(layer, "all-to-all", activation="bf16"))
    agree_on_refusing(
        r, "reduce_dtype is given", lambda: r.ep(layer, "all-to-all", reduce_dtype=torch.float32)
    )


@case
def unchecked(r: Rank) -> None:
    """Nothing but the data is sent; the result is the same."""
    layer = moe_cases.make(Shape(6, 128, 64, 8, 2))
    headers: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", lambda *_, **__: headers.append(1))
        got = [r.ep(layer, "all-to-all", check=False), r.tp(layer, check=False)]
        reduced = r.ep(layer, "all-reduce", check=False)
        with pytest.raises(ValueError, match="check=False needs as many"):
            r.ep(layer, "all-reduce", check=False, local=(0, 3))
    assert not headers
    assert_bitwise(got[0], r.one_process(layer), "all-to-all")
    assert_bitwise(got[1], r.tp(layer), "shards")
    assert_bitwise(reduced, r.ep(layer, "all-reduce"), "all-reduce")


@case
def captured(r: Rank) -> None:
    """Sums over NCCL replay in a CUDA graph, of other hidden states too."""
    if r.device.type != "cuda":
        return
    layer = moe_cases.make(Shape(6, 128, 64, 8, 2))
    first, count = r.local(8)
    x, routing = layer.x.to(r.device), r.placed((layer.ids, layer.weights))
    local_experts = to_device(select(layer.experts, first, count), r.device)
    part = to_device(shard(layer.experts, r.rank, r.ranks), r.device)
    options = {"group": r.group, "check": False, **r.options}

    def calls():
        yield fused_moe_tp(x, part, routing, **options)
        yield fused_moe_ep(
            x, local_experts, routing, local_expert_offset=first, dispatch="all-reduce", **options
        )

    list(calls())  # compile, connect
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = list(calls())
    x.copy_(x.roll(1, 0))
    graph.replay()
    for got, want in zip(found, calls(), strict=True):
        assert_bitwise(got, want, "replayed")
