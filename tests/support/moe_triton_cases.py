"""Cases of the Triton mixture of experts, for the interpreter and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from collections.abc import Sequence
from typing import get_args

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import GATED, PLAIN, Case, Shape

from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe import routing as triton_routing
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.finalize import finalize
from nvfp4_moe.kernels.moe.permute import permute as triton_permute
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.activation import IMPLEMENTED, ActivationType
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe import permute
from nvfp4_moe.reference.moe import routing as reference_routing
from nvfp4_moe.reference.moe.finalize import FinalizeOrder
from nvfp4_moe.reference.moe.finalize import finalize as reference_finalize
from nvfp4_moe.reference.moe.hidden_states import Activations, hidden_values
from nvfp4_moe.reference.moe.routing import METHODS, Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.layout import gemm2_values
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts

SMALL = GemmConfig(128, 16, 128, 1, 4)
CONFIGS = [
    GemmConfig(64, 16, 128, 4, 4),
    GemmConfig(128, 16, 256, 3, 4),
    GemmConfig(128, 64, 128, 3, 8, registers=128),
    GemmConfig(256, 128, 64, 4, 8, decoded=True),
]
"""Every configuration that `gemm_config` chooses below Blackwell; `test_moe_triton.py` says so."""
ONE = 0x38  # 1.0 in e4m3
RAW = (1, 3, 4, 5, 9)  # the methods that compare logits as they are
EXACT = [a for a in IMPLEMENTED if a.row.exact]


def to(device, thing):
    """A dataclass of tensors, or a tensor, on a device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if dataclasses.is_dataclass(thing):
        fields = {f.name: to(device, getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return type(thing)(**fields)
    return thing


def output_of(
    case: Case,
    device,
    config=None,
    recipe=None,
    local_expert_offset=0,
    order="flashinfer",
    dtype=torch.bfloat16,
):
    """Triton's output, on the device."""
    call = KernelCall(
        case.activations,
        case.experts,
        case.experts.num_local,
        recipe=recipe or Recipe(),
        local_expert_offset=local_expert_offset,
        finalize_order=order,
        output_dtype=dtype,
    )
    on_device = (to(device, t) for t in (call, case.ids, case.weights))
    return launch.fused_moe(*on_device, config=config)[0]


def both(case: Case, device, **options):
    """(Triton's output, the reference's) on the CPU."""
    want = reference.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        recipe=options.get("recipe"),
        local_expert_offset=options.get("local_expert_offset", 0),
        finalize_order=options.get("order", "flashinfer"),
        output_dtype=options.get("dtype", torch.bfloat16),
    ).output
    return output_of(case, device, **options).cpu(), want


def close(case: Case, device, what="", **options):
    """Inside the interval of every implementation that adds contiguous ranges of K."""
    got = output_of(case, device, **options)
    interval = fused_moe_bounds(
        *(to(device, t) for t in (case.activations, case.experts, case.ids, case.weights)),
        recipe=options.get("recipe"),
        local_expert_offset=options.get("local_expert_offset", 0),
        finalize_order=options.get("order", "flashinfer"),
        accumulation=CONTIGUOUS,
        output_dtype=got.dtype,
    ).output
    assert_inside(got, interval, what)


def coarse(
    shape: Shape, activation: ActivationType, seed: int = 0, *, static: bool = False
) -> Case:
    """Values of -1, 0 and 1 and scales of 1: every sum is exact in whatever order it is taken."""
    g = torch.Generator().manual_seed(seed)
    rows = shape.intermediate * (2 if activation.gated else 1)

    def codes(*size, density):
        value = torch.randint(0, 2, size, generator=g) * 8 + 2  # the codes of 1 and -1
        return e2m1.pack(
            torch.where(torch.rand(size, generator=g) < density, value, 0).to(torch.uint8)
        )

    def ones(*size):
        return torch.full(size, ONE, dtype=torch.uint8)

    e, h, i = shape.num_local, shape.hidden, shape.intermediate
    power = 2.0 ** torch.arange(e).remainder(3)
    experts = assemble_experts(
        codes(e, rows, h, density=0.2),
        ones(e, rows, h // 16),
        power,
        codes(e, h, i, density=0.1),
        ones(e, h, i // 16),
        1 / power,
        activation,
    )
    t = experts.padded_hidden_size
    activations = Activations(
        moe_cases.padded(codes(shape.tokens, h, density=0.3), t // 2),
        moe_cases.padded(ones(shape.tokens, h // 16), t // 16),
        None if static else 2.0 ** torch.arange(shape.tokens).remainder(5).sub(2),
    )
    ids, _ = moe_cases.routing_of(shape, seed)
    weights = 2.0 ** -torch.arange(shape.top_k).remainder(3).expand(shape.tokens, -1).float()
    case = Case(activations, experts, ids, weights.bfloat16(), None, None, None)
    assert_second_sums_are_exact(case, shape)
    return case


def real_widths(shape: Shape, config) -> None:
    """Judge a configuration: bitwise, and near with a gate and biases, whose epilogue is another."""
    case = coarse(shape, ActivationType.Relu2)
    assert_bitwise(*both(case, "cuda", config=config), "sums that are exact")
    g = torch.Generator().manual_seed(3)
    biases = {
        "w13_bias": torch.randn(shape.num_local, 2 * shape.intermediate, generator=g),
        "w2_bias": torch.randn(shape.num_local, shape.hidden, generator=g),
    }
    close(moe_cases.make(shape, **biases), "cuda", config=config)


def with_rows(case: Case, rows: Sequence[int]) -> Case:
    """Give each expert so many of the tokens, which are as many in all: a token has one expert."""
    ids = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(rows))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(case, ids=ids[order][:, None].contiguous())


def edges_of_widths(config, other) -> None:
    """Judge a ring by experts that have each width's tokens, one less and one more.

    Sums that are exact have the reference's bits, and sums that round those of another ring.
    """
    rows = [width + more for width in config.widths for more in (-1, 0, 1)]
    shape = Shape(sum(rows), 656, 144, len(rows), 1)
    case = with_rows(coarse(shape, ActivationType.Relu2), rows)
    assert_bitwise(*both(case, "cuda", config=config), "sums that are exact")
    case = with_rows(moe_cases.make(shape), rows)
    got, want = (output_of(case, "cuda", config=c) for c in (config, other))
    assert_bitwise(got, want, "sums that round")


def assert_second_sums_are_exact(case: Case, shape: Shape) -> None:
    """Integers of fewer than 24 bits, counted in units of the row's smallest step."""
    steps = reference.fused_moe(
        case.activations,
        case.experts,
        case.ids,
        case.weights,
        local_expert_offset=shape.offset,
        keep_steps=True,
    ).steps
    values = hidden_values(
        Activations(
            steps["fc2_input_codes"].flatten(0, 1), steps["fc2_input_block_scales"].flatten(0, 1)
        )
    )
    whole = (values.double() * 2**10).long()  # e2m1 times e4m3 is a multiple of 2^-10
    step = torch.where(whole == 0, 2**62, whole & -whole).amin(1, keepdim=True)
    for e in range(shape.num_local):
        rows = (case.ids.flatten() == e + shape.offset).nonzero()[:, 0]
        total = (whole[rows].abs() / step[rows]).double() @ gemm2_values(
            case.experts, e
        ).abs().double().T
        assert total.numel() == 0 or total.max() < 2**24


def activations_bitwise_or_close(device, config=SMALL):
    shape = Shape(5, 128, 128, 4, 2)
    for kind in GATED + PLAIN:
        if kind in EXACT:
            assert_bitwise(*both(coarse(shape, kind), device, config=config), kind.name)
        close(moe_cases.make(shape, kind), device, kind.name, config=config)


def odd_sizes(device, config=SMALL):
    """H and I that are no multiples of 128: padded, and the valid width returned."""
    for h, i, kind in ((144, 80, ActivationType.Relu2), (272, 48, ActivationType.Swiglu)):
        case = moe_cases.make(Shape(3, h, i, 3, 2), kind)
        close(case, device, f"{h} x {i}", config=config)
        assert both(case, device, config=config)[0].shape == (3, h)


def expert_parallel(device, config=SMALL):
    for offset, local in ((0, 2), (2, 3), (5, 1)):
        shape = Shape(9, 128, 128, 6, 3, offset, local)
        case = coarse(shape, ActivationType.Relu2)
        assert_bitwise(*both(case, device, local_expert_offset=offset, config=config), str(shape))


def recipes(device, config=SMALL):
    case = coarse(Shape(5, 128, 128, 4, 2), ActivationType.Identity)
    for recipe in (Recipe("exact"), Recipe("fast", NVFP44Over6Config(256, "MSE"))):
        assert_bitwise(*both(case, device, recipe=recipe, config=config), str(recipe))


def parameters_and_biases(device, config=SMALL):
    g = torch.Generator().manual_seed(3)
    for kind in GATED:
        given = {"alpha": 1.702, "beta": 1.0, "clamp_limit": 1.5}
        given = {name: given[name] for name in kind.parameters}
        bias = {"w13_bias": torch.randn(4, 256, generator=g)}
        bias["w2_bias"] = torch.randn(4, 128, generator=g)
        case = moe_cases.make(Shape(6, 128, 128, 4, 2), kind, **given, **bias)
        close(case, device, kind.name, config=config)


def weights_of_all_magnitudes(device, config=SMALL):
    """Beside biases, a beta and a limit that a scale of their own could not hold."""
    case = moe_cases.make(Shape(8, 128, 64, 4, 2))
    sizes = torch.tensor([2.0**-133, 1e-36, 1e-3, 1e9], dtype=torch.float64)[:, None, None]
    w13, w2 = ((w * sizes).bfloat16() for w in (case.w13, case.w2))
    g = torch.Generator().manual_seed(5)
    bias = {
        "w13_bias": torch.randn(4, 128, generator=g),
        "w2_bias": torch.randn(4, 128, generator=g),
    }
    given = {"alpha": 1.702, "beta": torch.tensor([1.0, 0.5, 1.0, 1e4]), "clamp_limit": 7.0}
    experts = prepare_experts(w13, w2, **bias, **given)
    case = dataclasses.replace(case, experts=experts)
    assert output_of(case, device, config).isfinite().all()
    close(case, device, "weights of all magnitudes", config=config)


def bf16_activations(device, config=SMALL):
    case = moe_cases.make(Shape(5, 128, 128, 4, 2), mode="bf16")
    close(case, device, "bf16", config=config)


def static_scales(device, config=SMALL):
    """fp32 intermediates, quantized by blocks alone."""
    for kind in (ActivationType.Identity, ActivationType.Relu2):
        case = coarse(Shape(5, 128, 128, 4, 2), kind, static=True)
        for recipe in (Recipe(), Recipe("exact"), Recipe("fast", NVFP44Over6Config())):
            assert_bitwise(*both(case, device, recipe=recipe, config=config), f"{kind} {recipe}")
    close(moe_cases.make(Shape(5, 128, 128, 4, 2), mode="static"), device, config=config)


def call_of(activations, case, recipe):
    """A call in the order of slots, which quantizes bf16 hidden states."""
    return KernelCall(
        activations,
        case.experts,
        case.experts.num_local,
        recipe=recipe,
        finalize_order="slot",
        quantize="per-token" if activations.is_bf16 else None,
    )


def quantized_on_the_way(device, config=SMALL):
    """bf16 hidden states, quantized by the call itself: the bits of quantizing them before."""
    case = moe_cases.make(Shape(7, 144, 80, 4, 2))
    width = case.experts.padded_hidden_size
    x = torch.nn.functional.pad(case.x, (0, width - case.x.shape[1]))
    for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config(256, "MSE"))):
        q = quantize_per_token(x, recipe.base_scale_inv, recipe)
        given = Activations(q.codes, q.block_scales, q.per_token_scale)
        outputs = [
            launch.fused_moe(
                *(to(device, t) for t in (call_of(a, case, recipe), case.ids, case.weights)),
                config=config,
            )[0]
            for a in (Activations(x), given)
        ]
        assert_bitwise(*outputs, str(recipe))


def skewed_routing(device, config=SMALL):
    """All tokens on one expert, experts without tokens, no tokens at all, K of 1 and of E."""
    shape = Shape(40, 128, 128, 4, 1)
    case = coarse(shape, ActivationType.Relu2)
    for expert in (0, 3):
        ids = torch.full_like(case.ids, expert)
        one = dataclasses.replace(case, ids=ids)
        assert_bitwise(*both(one, device, config=config), f"all on expert {expert}")
    for t, k in ((0, 2), (1, 4), (2, 4)):
        case = coarse(Shape(t, 128, 128, 4, k), ActivationType.Relu2)
        assert_bitwise(*both(case, device, config=config), f"T={t} K={k}")


def slots_of_no_expert(device, config=SMALL):
    """Ids of -1 and of another rank, with every kind of weight; with K = 5 in two groups."""
    for shape in (Shape(6, 128, 128, 6, 2, 2, 3), Shape(6, 128, 128, 6, 5, 2, 3)):
        case = moe_cases.with_strange_weights(coarse(shape, ActivationType.Relu2), shape)
        got, want = both(case, device, local_expert_offset=2, config=config)
        assert got.isfinite().all()
        assert_bitwise(got, want, str(shape))
        close(case, device, str(shape), local_expert_offset=2, config=config)


def finalize_orders(device, config=SMALL):
    case = moe_cases.make(Shape(3, 128, 128, 8, 8), weights_dtype=torch.float32)
    for order in get_args(FinalizeOrder):
        close(case, device, order, order=order, config=config)


def finalized(device, config=None):
    """To the bit: zeros of either sign, subnormal sums, slots of no expert."""
    g = torch.Generator().manual_seed(7)
    tokens, top_k, width = 6, 5, 64
    rows = torch.randn(tokens * top_k, width, generator=g)
    rows = rows.clamp(min=0.1) * torch.exp2(
        torch.randint(-120, -110, rows.shape, generator=g).float()
    )
    rows *= torch.rand(rows.shape, generator=g).sub(0.5).sign()
    rows[torch.rand(rows.shape, generator=g) < 0.4] = -0.0
    weights = torch.rand(tokens, top_k, generator=g) * 2.0**-12
    permuted = torch.arange(tokens * top_k, dtype=torch.int32)
    permuted[torch.rand(tokens * top_k, generator=g) < 0.3] = -1
    permuted[:top_k] = -1
    rows = rows.bfloat16()
    held = (permuted >= 0).view(tokens, top_k)
    for order in get_args(FinalizeOrder):
        want = reference_finalize(rows.view(tokens, top_k, width), weights, order, held)
        got = torch.empty(tokens, width, dtype=torch.float32, device=device)
        finalize(*(t.to(device) for t in (rows, permuted, weights)), got, order)
        assert_bitwise(got.cpu(), want, order)


def output_dtypes(device, config=SMALL):
    case = coarse(Shape(5, 128, 128, 4, 2), ActivationType.Relu2)
    for dtype in (torch.float32, torch.float16):
        got, want = both(case, device, dtype=dtype, config=config)
        assert got.dtype == dtype
        assert_bitwise(got, want, str(dtype))


def routing(device, config=None):
    """Ids, ties of raw logits included, and weights as the reference's."""
    g = torch.Generator().manual_seed(11)
    for method in METHODS:
        for experts, k in ((16, 1), (100, 5), (128, 8)):
            r = Routing(method, 1 if method == RoutingMethodType.Llama4 else k)
            logits = torch.randn(9, experts, generator=g)
            biased = method.biased
            bias = torch.randn(experts, generator=g) / 4 if biased else None
            if int(method) in RAW:
                logits = (logits * 4).round().bfloat16()  # ties
            _routed_alike(device, logits, r, bias, f"{method.name} {experts} {k}")


def _routed_alike(device, logits, routing, bias, what):
    ids, weights = triton_routing.route(
        logits.to(device), routing, None if bias is None else bias.to(device)
    )
    want = reference_routing.route(logits, routing, bias)
    what = f"{what}, {routing.functions}"
    assert_bitwise(ids, want.ids, f"{what}: ids")
    weights, right = weights.cpu(), want.weights_bf16
    assert torch.equal(weights.isnan(), right.isnan()), what
    assert_bitwise(weights.nan_to_num(), right.nan_to_num(), f"{what}: weights")


def routing_of_a_gpu(device, config=None):
    """By its instructions: both orders of Default's sum, more experts than FlashInfer's kernels have."""
    hopper = Routing(RoutingMethodType.Default, 2, functions="hopper")
    if reason := triton_routing.refusal(hopper, torch.device(device)):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(12)
    for tokens, experts in ((3, 100), (3, 256), (65, 160), (2, 300)):
        logits = torch.randn(tokens, experts, generator=g) * 4
        _routed_alike(device, logits, hopper, None, f"{tokens} tokens, {experts} experts")
    for method in METHODS:
        top_k = 1 if method == RoutingMethodType.Llama4 else 5
        r = dataclasses.replace(hopper, method=method, top_k=top_k)
        bias = torch.randn(16, generator=g) / 4 if method.biased else None
        for what, logits in strange_logits(1 if device == "cpu" else 64).items():
            _routed_alike(device, logits, r, bias, f"{method.name} {what}")


def strange_logits(rows: int) -> dict[str, torch.Tensor]:
    """[rows, 16] fp32 where scores tie, vanish or are no numbers."""
    g = torch.Generator().manual_seed(18)
    normal = torch.randn(rows, 16, generator=g)
    special = torch.tensor(
        [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]
    )
    place = torch.randint(0, len(special), (rows, 16), generator=g)
    masked = normal.masked_fill(torch.rand(rows, 16, generator=g) < 0.5, -torch.inf)
    return {
        "sigmoids near 0": normal - 18.5,
        "sigmoids near 1": normal + 17.5,
        "exponentials that underflow": normal * 60,
        "exponentials near 2^-126": normal.mul(1e-2).sub(87.34).index_fill(1, torch.tensor([3]), 0),
        "nearly equal": normal * 1e-7 + 1,
        "masked by -inf": masked,
        "zeros of both signs": torch.where(normal < 0, -0.0, 0.0),
        "special values": torch.where(normal < 0, special[place], normal),
        "special values alone": special[place],
        "all -inf": torch.full_like(normal, -torch.inf),
        "all NaN": torch.full_like(normal, torch.nan),
    }


def routing_of_strange_logits(device, config=None):
    for what, logits in strange_logits(2 if device == "cpu" else 64).items():
        for method in METHODS:
            r = Routing(method, 1 if method == RoutingMethodType.Llama4 else 5)
            bias = None
            if method.biased:
                bias = torch.tensor([1e-38, -1e-39, 0.0, -0.0, 2e-39, -3.0, 1e-9, -torch.inf] * 2)
            _routed_alike(device, logits, r, bias, f"{method.name} {what}")
            if int(method) in RAW:  # the others compare fp32 scores
                _routed_alike(device, logits.bfloat16(), r, bias, f"{method.name} {what}, bf16")


def routing_by_groups(device, config=None):
    """Groups of any size, a bias whose rounding to bf16 decides, sums of scores that are no numbers."""
    g = torch.Generator().manual_seed(19)
    exact = Routing(RoutingMethodType.DeepSeekV3, 5, n_group=4, topk_group=2)
    hopper = dataclasses.replace(exact, functions="hopper")
    both = [exact] if triton_routing.refusal(hopper, torch.device(device)) else [exact, hopper]
    sizes = ((60, 3, 1), (96, 4, 2), (256, 8, 4), (22, 11, 11), (16, 4, 2))
    for r in both:
        for experts, groups, top in sizes:
            some = dataclasses.replace(r, n_group=groups, topk_group=top, routed_scaling_factor=2.5)
            logits = torch.randn(7, experts, generator=g) / 8
            bias = 1 + torch.randn(experts, generator=g) / 64
            for b in (None, bias, bias.bfloat16()):
                _routed_alike(
                    device, logits, some, b, f"{experts} experts, {top} of {groups} groups"
                )
        bias = torch.tensor([1e-38, -1e-39, 0.0, -0.0, 2e-39, -3.0, 1e-9, -torch.inf] * 2)
        for what, logits in strange_logits(2 if device == "cpu" else 64).items():
            _routed_alike(device, logits, r, bias, f"groups, {what}")


CASES = [
    routing,
    routing_by_groups,
    routing_of_strange_logits,
    routing_of_a_gpu,
    activations_bitwise_or_close,
    odd_sizes,
    expert_parallel,
    recipes,
    parameters_and_biases,
    weights_of_all_magnitudes,
    bf16_activations,
    static_scales,
    quantized_on_the_way,
    skewed_routing,
    slots_of_no_expert,
    finalize_orders,
    finalized,
    output_dtypes,
]


def permutation(device, tokens: int, experts: int, top_k: int, offset: int, num_local: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=g).topk(top_k).indices.int()
    p = triton_permute(ids.to(device), num_local, offset, 16)
    permuted, expanded = p.permuted.cpu(), p.expanded.cpu()
    want = permute.permutation(ids, num_local, offset)
    assert torch.equal(permuted, want)
    here = want >= 0
    assert torch.equal(expanded[want[here].long()].long(), here.nonzero()[:, 0])
    counts = (ids.flatten().long() - offset)[here].bincount(minlength=num_local)
    end = counts.cumsum(0)
    assert torch.equal(p.end.cpu().long(), end)
    # Whole tiles by expert, then each expert's last one, the fullest first.
    whole, last = [], []
    for expert in range(num_local):
        first, rows = int(end[expert] - counts[expert]), int(counts[expert])
        whole += [(expert, first + row, 16) for row in range(0, rows // 16 * 16, 16)]
        last += [(expert, first + rows // 16 * 16, rows % 16)] if rows % 16 else []
    tiles = whole + sorted(last, key=lambda tile: -tile[2])
    unused = [(-1, 0, 0)] * (p.tiles.shape[0] - len(tiles))
    assert p.tiles.tolist() == [[*tile, len(tiles)] for tile in tiles + unused]
