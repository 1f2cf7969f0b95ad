"""Shards of prepared experts, and the sums of ranks: the reference, in one process."""

# SPDX-License-Identifier: Apache-2.0
import itertools
import re
from dataclasses import fields, replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape
from tp_difference import changed

from nvfp4_moe.cases import inputs
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.bounds.parallel import (
    all_reduce_bounds,
    expert_parallel_bounds,
    tensor_parallel_bounds,
)
from nvfp4_moe.reference.moe.layer import fused_moe
from nvfp4_moe.reference.moe.shards import (
    fused_moe_shards,
    select_experts,
    shard_columns,
    shard_experts,
    shard_size,
)
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.cutlass import with_cutlass
from nvfp4_moe.reference.weights.layout import gemm1_values, gemm2_values, unshuffled_bias
from nvfp4_moe.reference.weights.prepare import prepare_experts

SHAPE = Shape(6, 144, 112, 3, 2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def biased(kind, **options):
    g = torch.Generator().manual_seed(3)
    rows = SHAPE.intermediate * (2 if kind.gated else 1)
    return moe_cases.make(
        SHAPE,
        kind,
        w13_bias=torch.randn(3, rows, generator=g),
        w2_bias=torch.randn(3, SHAPE.hidden, generator=g),
        **options,
    )


def arguments(case):
    return case.activations, case.experts, case.ids, case.weights


def test_columns_are_whole_blocks_that_cover_all():
    for intermediate, shards in itertools.product((16, 112, 704, 768), (1, 2, 3, 4, 7)):
        if shards > intermediate // 16:
            with pytest.raises(ValueError, match=re.escape(f"shards is {shards}; an intermediate")):
                shard_columns(intermediate, 0, shards)
            continue
        parts = [shard_columns(intermediate, rank, shards) for rank in range(shards)]
        assert [c for p in parts for c in range(intermediate)[p]] == list(range(intermediate))
        assert all(p.start % 16 == 0 for p in parts)
        sizes = [p.stop - p.start for p in parts]
        assert max(sizes) == shard_size(intermediate, shards, gated=True)
    assert shard_size(1536, 8, gated=False) == 256 and shard_size(1536, 8, gated=True) == 192
    assert shard_size(704, 8, gated=True) == 96
    with pytest.raises(ValueError, match="rank is 2; of 2 shards"):
        shard_columns(112, 2, 2)
    with pytest.raises(ValueError, match="shards is 2; an intermediate of 40 has 2 whole blocks"):
        shard_columns(40, 0, 2)


@pytest.mark.parametrize(
    "kind", [ActivationType.Swiglu, ActivationType.Relu2], ids=lambda k: k.name
)
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
def test_a_shard_has_the_same_weights(kind, shards):
    """Codes times scales, biases and scalars, cut; gemm2_bias once; the rest zero."""
    whole = biased(kind).experts
    halves = 2 if kind.gated else 1
    for rank in range(shards):
        shard = shard_experts(whole, rank, shards)
        columns = shard_columns(SHAPE.intermediate, rank, shards)
        width = columns.stop - columns.start
        assert shard.intermediate_size == shard_size(SHAPE.intermediate, shards, kind.gated)
        for e in range(whole.num_local):
            want = gemm1_values(whole, e).unflatten(0, (halves, -1))[:, columns]
            have = gemm1_values(shard, e).unflatten(0, (halves, -1))
            assert_bitwise(have[:, :width], want, "first GEMM")
            assert not have[:, width:].any()
            have = gemm2_values(shard, e)
            assert_bitwise(have[:, :width], gemm2_values(whole, e)[:, columns], "second GEMM")
            assert not have[:, width:].any()
        want = unshuffled_bias(whole.gemm1_bias, kind.gated).unflatten(1, (halves, -1))
        have = unshuffled_bias(shard.gemm1_bias, kind.gated).unflatten(1, (halves, -1))
        assert_bitwise(have[..., :width], want[..., columns], "first bias")
        assert (shard.gemm2_bias is not None) == (rank == 0)
        if rank == 0:
            assert_bitwise(shard.gemm2_bias, whole.gemm2_bias, "second bias")
        for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
            assert_bitwise(getattr(shard, name), getattr(whole, name), name)


def test_one_shard_is_the_layer():
    given = {"alpha": 1.5, "beta": 0.5, "clamp_limit": 2.0}
    static = {"mode": "static", **given}
    for case in (biased(ActivationType.Swiglu, **given), biased(ActivationType.Swiglu, **static)):
        shard = shard_experts(case.experts, 0, 1)
        for field in fields(shard):
            have, want = getattr(shard, field.name), getattr(case.experts, field.name)
            if isinstance(want, torch.Tensor):
                assert_bitwise(have, want, field.name)
            else:
                assert have == want, field.name
        want = fused_moe(*arguments(case)).output
        assert_bitwise(fused_moe_shards(*arguments(case), tp_shards=1).output, want, "output")


def test_layouts_of_other_backends_are_made_again():
    made = moe_cases.make(SHAPE, mode="static").experts
    prepared = with_cutlass(made)
    for part in (shard_experts(prepared, 0, 2), select_experts(prepared, 1, 2)):
        assert part.cutlass is None
        assert with_cutlass(part).cutlass is not None


def test_selected_experts_are_those():
    case = biased(ActivationType.Swiglu, alpha=1.5, clamp_limit=2.0)
    part = select_experts(case.experts, 1, 2)
    assert part.num_local == 2
    parts = [
        fused_moe(
            case.activations,
            select_experts(case.experts, first, count),
            case.ids,
            case.weights,
            local_expert_offset=first,
        ).rows
        for first, count in ((0, 1), (1, 2))
    ]
    assert_bitwise(parts[0] + parts[1], fused_moe(*arguments(case)).rows, "rows")
    for first, count in ((0, 4), (3, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"first is {first} and count {count}; there are 3"):
            select_experts(case.experts, first, count)


def test_weights_cut_before_they_are_quantized_have_other_scalars():
    case = moe_cases.make(SHAPE)
    halves = case.w13.unflatten(1, (2, -1))
    names = ("output1_scale_gate_scalar", "output2_scale_scalar")
    differ = {name: [] for name in names}
    for rank in range(2):
        columns = shard_columns(SHAPE.intermediate, rank, 2)
        w13 = halves[:, :, columns].flatten(1, 2)
        own = prepare_experts(w13, case.w2[..., columns].contiguous())
        shard = shard_experts(case.experts, rank, 2)
        for name in names:
            differ[name] += (getattr(own, name) != getattr(shard, name)).tolist()
    assert all(any(found) for found in differ.values())


@pytest.mark.parametrize("reduce_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [2, 4])
def test_the_sum_of_shards_is_inside_in_any_order(shards, reduce_dtype):
    case = biased(ActivationType.Swiglu)
    given = {"reduce_dtype": reduce_dtype, "output_dtype": torch.bfloat16}
    result = fused_moe_shards(*arguments(case), tp_shards=shards, **given)
    allowed = tensor_parallel_bounds(*arguments(case), shards, **given)
    assert_inside(result.output, allowed, "rank order")
    for order in itertools.permutations(s.output for s in result.shards):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert_inside(total.bfloat16(), allowed, "another order")
    wide = sum(s.output.double() for s in result.shards).to(reduce_dtype).bfloat16()
    assert_inside(wide, allowed, "added in a wider type")
    # What the intervals are for.
    twice = replace(shard_experts(case.experts, 1, shards), gemm2_bias=case.experts.gemm2_bias)
    extra = fused_moe(
        case.activations, twice, case.ids, case.weights, output_dtype=reduce_dtype
    ).output
    rest = sum(s.output.double() for r, s in enumerate(result.shards) if r != 1)
    for name, wrong in {
        "bias twice": (rest + extra.double()).bfloat16(),
        "a shard missing": rest.bfloat16(),
        "one row maximum for all": fused_moe(*arguments(case)).output,
    }.items():
        assert not allowed.contains(wrong).all(), name


def test_all_reduce_of_experts_is_inside():
    case, counts = biased(ActivationType.Swiglu), (1, 1, 1)
    for reduce_dtype in DTYPES:
        given = {"output_dtype": reduce_dtype, "finalize_order": "slot"}
        parts = [
            fused_moe(
                case.activations,
                select_experts(case.experts, e, 1),
                case.ids,
                case.weights,
                local_expert_offset=e,
                **given,
            ).output
            for e in range(3)
        ]
        allowed = expert_parallel_bounds(
            *arguments(case), counts, reduce_dtype=reduce_dtype, **given
        )
        for order in itertools.permutations(parts):
            assert_inside((order[0] + order[1]) + order[2], allowed, f"{reduce_dtype}")
        assert not allowed.contains(parts[0] + parts[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_intervals_of_sums(dtype):
    """Every tree over numbers that cancel, and what must not be allowed."""
    g = torch.Generator().manual_seed(5)
    n = 5
    parts = (
        torch.randn(n, 20000, generator=g) * torch.exp2(torch.randn(n, 1, generator=g) * 4)
    ).to(dtype)
    parts[-1] = -parts[:-1].double().sum(0).to(dtype)
    allowed = all_reduce_bounds([Interval.point(p) for p in parts], dtype, dtype)
    for order in itertools.permutations(range(n)):
        a, b, c, d, e = (parts[i] for i in order)
        assert_inside((((a + b) + c) + d) + e, allowed, "a chain")
        assert_inside((a + b) + ((c + d) + e), allowed, "a tree")
    two = all_reduce_bounds([Interval.point(p) for p in parts[:2]], dtype, dtype)
    assert_inside(parts[0] + parts[1], two, "two ranks")
    if dtype == torch.float32:
        assert_bitwise(two.low, two.high, "one rounding")
    zero = Interval.point(torch.zeros(20000))
    padded = all_reduce_bounds([Interval.point(parts[0]), zero, zero], dtype, dtype)
    assert_bitwise(padded.low, parts[0].double(), "zeros add exactly")
    if dtype == torch.float32:
        coarse = sum(p.bfloat16() for p in parts).float()
        assert not allowed.contains(coarse).all(), "bf16 is not fp32"


def test_sums_that_may_overflow():
    large = Interval.point(torch.tensor([6e4, 1.0]))
    minus = Interval.point(torch.tensor([-6e4, 1.0]))
    allowed = all_reduce_bounds([large, large, minus], torch.float16, torch.float16)
    assert 5.9e4 < allowed.low[0] <= 6e4 and allowed.high[0] == torch.inf
    assert 2.99 < allowed.low[1] <= 3 <= allowed.high[1] < 3.01


def test_shards_change_a_quarter_to_a_half_of_real_values():
    """The larger a row's outliers are, the more of its blocks keep their scales."""
    found = {
        name: (changed(x, 2, Recipe()), changed(x, 4, Recipe()))
        for name, x in inputs.activations().items()
        if name.endswith("ffn_mid")
    }
    assert len(found) == 6
    for name, (two, four) in found.items():
        if name.startswith("smollm2"):
            assert 0.25 < two < 0.40 and 0.37 < four < 0.59, name
        else:
            assert 0.42 < two < 0.46 and 0.63 < four < 0.70, name
