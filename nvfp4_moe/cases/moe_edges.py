"""Fused calls whose inputs show mistakes that ordinary numbers hide.

Each is small. Ordinary layers have block scales near 1, logits that no format confuses, and sums whose
terms hide a wrong one: here block scales are subnormal in e4m3, a block is far below its row's maximum,
sums cancel, weights and rows have any size, routers are nearly or exactly undecided.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import host
from ..reference.activation import IMPLEMENTED, ActivationType
from ..reference.layouts import from_linear, to_linear
from ..reference.moe.hidden_states import Activations, quantize_activations
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.numerics import e2m1
from ..reference.quantize import quantize_global_scale
from ..reference.recipe import BLOCK_SIZE, Recipe, SfLayout
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_experts, prepare_experts
from .moe_case import MoECase

SIZE, TOKENS = 128, 16
"""The H (`cases` doubles it) and I, and the T, of most cases."""
_128X4 = SfLayout.layout_128x4
_A, _M = ActivationType, RoutingMethodType
_ONE = 0x38  # 1.0 in e4m3
PARAMETERS = {"alpha": 1.3, "beta": 0.8, "clamp_limit": 2.5}


def cases(recipe: Recipe) -> Iterator[MoECase]:
    """Make all edge cases as wide as FlashInfer's layers need; `recipe` is the intermediate's."""
    for part in (far_below, activations, static, routed, sizes):
        yield from map(_widened, part(recipe))


def _widened(case: MoECase) -> MoECase:
    """Add as many columns of zeros to H of a case as it has; outputs of the others stay as they are."""
    e, a = case.experts, case.activations
    h = e.hidden_size

    def behind(t: torch.Tensor, dim: int) -> torch.Tensor:
        bytes_ = t.view(torch.uint8)
        return torch.cat([bytes_, torch.zeros_like(bytes_)], dim).view(t.dtype)

    linear = to_linear(e.gemm1_weights_scale, e.gemm1_weights.shape[1], h // BLOCK_SIZE, _128X4)
    experts = replace(
        e,
        gemm1_weights=behind(e.gemm1_weights, 2),
        gemm1_weights_scale=from_linear(behind(linear, 2), _128X4),
        gemm2_weights=behind(e.gemm2_weights, 1),
        gemm2_weights_scale=behind(e.gemm2_weights_scale, 1),
        gemm2_bias=None if e.gemm2_bias is None else behind(e.gemm2_bias, 1),
        hidden_size=2 * h,
    )
    scales = None if a.block_scales is None else behind(a.block_scales, 1)
    states = replace(a, hidden_states=behind(a.hidden_states, 1), block_scales=scales)
    return replace(case, experts=experts, activations=states)


def _g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bytes(low: int, high: int, *size: int, seed: int) -> torch.Tensor:
    return host.integers(_g(seed), low, high, size).to(torch.uint8)


def _experts(
    count: int,
    kind: ActivationType,
    seed: int,
    hidden: int = SIZE,
    *,
    rows: float = 1.0,
    **options: Any,
) -> Experts:
    """Make codes of any kind under block scales about 1; rows are `rows` times as large."""
    m1 = SIZE * (2 if kind.gated else 1)
    return assemble_experts(
        _bytes(0, 256, count, m1, hidden // 2, seed=seed),
        _bytes(0x30, 0x40, count, m1, hidden // BLOCK_SIZE, seed=seed + 1),
        host.full((count,), 0.3 * hidden**-0.5),
        _bytes(0, 256, count, hidden, SIZE // 2, seed=seed + 2),
        _bytes(0x30, 0x40, count, hidden, SIZE // BLOCK_SIZE, seed=seed + 3),
        host.full((count,), 0.3 * SIZE**-0.5 * rows),
        kind,
        **options,
    )


def _given(top_k: int, tokens: int = TOKENS, experts: int = 2) -> dict[str, Any]:
    ids = host.arange(tokens)[:, None] + host.arange(top_k)
    weights = 0.2 + host.uniform(_g(tokens), tokens, top_k)
    return {
        "routing": Routing(_M.Renormalize, top_k),
        "num_experts": experts,
        "ids": (ids % experts).int(),
        "weights": weights.bfloat16(),
    }


def far_below(recipe: Recipe) -> Iterator[MoECase]:
    """Make subnormal block scales in all operands; their blocks alone make half of the sums.

    Of the hidden states every block but the first is 2^15 below it, and every second block of 16 rows of
    the weights has zeros there; so the intermediate has such blocks, and the second weights zeros
    for the others. A row is zero.
    """
    for kind in (_A.Identity, _A.Swiglu):
        rows = SIZE * (2 if kind.gated else 1)
        blocks = SIZE // BLOCK_SIZE
        states = _bytes(0, 256, TOKENS, SIZE // 2, seed=1)
        scales = _bytes(1, 9, TOKENS, blocks, seed=2)  # 2^-9 to 1.125 * 2^-6
        scales[:, 0] = 0x7A
        token = host.powers(host.arange(TOKENS).remainder(5))
        states[3], scales[3], token[3] = 0, 0, 0.0
        w13 = _bytes(0, 256, 2, rows, SIZE // 2, seed=3)
        s13 = _bytes(1, 12, 2, rows, blocks, seed=4)
        s13[:, ::3] = 0x38
        row = host.arange(rows)
        small = (row // BLOCK_SIZE % 2 == 1) & (row < SIZE)  # of a gated layer the up half alone
        w13[:, small, : BLOCK_SIZE // 2] = 0
        w2 = _bytes(0, 256, 2, SIZE, SIZE // 2, seed=5)
        s2 = _bytes(1, 12, 2, SIZE, blocks, seed=6)
        s2[:, ::5] = 0x38
        large = host.arange(SIZE // 2) // (BLOCK_SIZE // 2) % 2 == 0
        w2[:, ::2, large] = 0
        decode = host.fp32([1.0, 0.7]) * (0.02 if kind.gated else 4.0)
        experts = assemble_experts(w13, s13, decode, w2, s2, decode * 64, kind)
        yield MoECase(
            f"{kind.name}, blocks far below their row's maximum",
            Activations(states, scales, token),
            experts,
            recipe=recipe,
            **_given(1),
        )


def activation_layer(kind: ActivationType, **options: Any) -> Experts:
    """Make two experts whose second GEMM is the unit matrix: the output is the intermediate."""
    rows = SIZE * (2 if kind.gated else 1)
    one = torch.eye(SIZE, dtype=torch.uint8, device="cpu") * e2m1.VALUES.index(1.0)
    ones = torch.full((2, SIZE, SIZE // BLOCK_SIZE), _ONE, dtype=torch.uint8, device="cpu")
    return assemble_experts(
        _bytes(0, 256, 2, rows, SIZE // 2, seed=int(kind)),
        _bytes(0x24, 0x40, 2, rows, SIZE // BLOCK_SIZE, seed=int(kind) + 50),
        host.fp32([0.7, 0.11]),
        e2m1.pack(one).expand(2, -1, -1).contiguous(),
        ones,
        host.ones(2),
        kind,
        **options,
    )


def activations(recipe: Recipe) -> Iterator[MoECase]:
    """Make every activation of 2^-12 to 2^9: sums of one term, and a unit matrix as second GEMM."""
    for kind in IMPLEMENTED:
        read = {name: PARAMETERS[name] for name in sorted(kind.parameters)}
        for options in ({}, read) if read else ({},):
            x = host.zeros(TOKENS, SIZE)
            token = host.arange(TOKENS)
            x[token, token * 7 % SIZE] = 1.0625 * host.powers(token % 14 - 8)
            yield MoECase(
                f"{kind.name}, the activation alone{', parameters' if options else ''}",
                Activations(x.bfloat16()),
                activation_layer(kind, **options),
                recipe=recipe,
                **_given(1) | {"weights": host.ones(TOKENS, 1).bfloat16()},
            )


def static(recipe: Recipe) -> Iterator[MoECase]:
    """Make every activation under static scales."""
    for kind in IMPLEMENTED:
        rows = SIZE * (2 if kind.gated else 1)
        g = _g(int(kind))
        w13 = host.normal(g, 2, rows, SIZE) / 8
        w2 = host.normal(g, 2, SIZE, SIZE) / 8
        experts = prepare_experts(
            w13.bfloat16(), w2.bfloat16(), kind, input_amax=20.0, intermediate_amax=20.0
        )
        x = host.normal(g, TOKENS, SIZE) * host.powers(host.arange(TOKENS)[:, None] % 5 - 2)
        assert experts.input_scale is not None
        q = quantize_global_scale(x.bfloat16(), experts.input_scale, replace(recipe, build="cuda"))
        yield MoECase(
            f"{kind.name}, static, small",
            Activations(q.codes, q.block_scales),
            experts,
            recipe=recipe,
            **_given(2),
        )


def routers() -> Iterator[tuple[str, Routing, torch.Tensor, torch.Tensor | None]]:
    """Yield (name, routing, logits [T, E], bias [E]) of routers that are nearly or exactly undecided."""
    tokens, experts = 8, 16
    order = torch.stack(
        [
            torch.randperm(experts, generator=_g(t), dtype=torch.int64, device="cpu")
            for t in range(tokens)
        ]
    )
    normal = host.normal(_g(0), tokens, experts)
    near = 2 + order.float() * 2.0**-14  # equal in bf16 and in fp16
    for method in (_M.Renormalize, _M.RenormalizeNaive, _M.TopK, _M.TopKSigmoid, _M.Llama4):
        yield "logits near each other", Routing(method, 1 if method == _M.Llama4 else 2), near, None
    wide = host.arange(experts).float() * 4 - 30 + normal / 8  # weights down to 2^-40
    for method in (_M.Renormalize, _M.Default):
        yield "a peaked router", Routing(method, 8), wide, None
    for method in (_M.Renormalize, _M.Default):  # whose exponentials leave fp32
        yield "logits far from zero", Routing(method, 2), 300 + 4 * normal, None
    yield "large logits", Routing(_M.TopK, 2), order.float() * 9000, None
    groups = Routing(_M.DeepSeekV3, 4, 4, 2, 2.5)
    yield (
        "groups, all scores negative",
        groups,
        normal,
        -4 + host.arange(experts).float() / (experts - 1),
    )
    same = normal.clone()
    same[:, 4:8] = same[:, 8:12] = same[:, :4]
    same[:, 12:] = -6.0
    yield "groups, three of them equal", groups, same, host.zeros(experts)
    fine = 8 + 0.011 * order[0].float()  # bf16 has steps of 1/16 there
    yield "groups, a bias between numbers of bf16", groups, normal / 64, fine
    alone = Routing(_M.DeepSeekV3, 4, None, None, 2.5)
    yield "a bias between numbers of bf16", alone, normal / 64, fine
    yield "all scores negative", replace(alone, method=_M.MiniMax2), normal, fine - 12


def routed(recipe: Recipe) -> Iterator[MoECase]:
    """Make calls of such routers, with experts that are larger the smaller their logits are."""
    layer = _experts(16, _A.Relu2, 30)
    for name, routing, logits, bias in routers():
        size = torch.exp2(-1.5 * logits[0]) if "peaked" in name else _of_order(16)
        experts = replace(layer, output2_scale_scalar=layer.output2_scale_scalar * size)
        x = host.normal(_g(9), logits.shape[0], SIZE).bfloat16()
        yield MoECase(
            f"Relu2, {routing.method.name}, {name}",
            quantize_activations(x, replace(recipe, build="cuda")),
            experts,
            routing,
            16,
            logits=logits.float(),
            routing_bias=bias,
            recipe=recipe,
        )


def _of_order(count: int) -> torch.Tensor:
    return host.powers(host.arange(count) * 5 % count - count // 2)


def sizes(recipe: Recipe) -> Iterator[MoECase]:
    """Make numbers that fp16 lacks, sums that cancel, weights of any size, and an output in fp32."""
    g = _g(4)
    size = host.powers(host.fp32([20, -30, 17, -17, 60, -60, 0, 3])).repeat(TOKENS // 8)[:, None]
    x = (host.normal(g, TOKENS, SIZE) * size).bfloat16()
    experts = _experts(2, _A.Identity, 40)
    yield MoECase(
        "Identity, bf16, tokens of any size", Activations(x), experts, recipe=recipe, **_given(1)
    )
    yield MoECase(
        "Identity, tokens of any size",
        quantize_activations(x, replace(recipe, build="cuda")),
        experts,
        recipe=recipe,
        **_given(1),
    )

    g = _g(13)
    biases = {"w13_bias": host.normal(g, 2, 2 * SIZE) / 2, "w2_bias": host.normal(g, 2, SIZE) / 2}
    options: dict[str, Any] = PARAMETERS | biases
    experts = _experts(2, _A.Swiglu, 70, **options)
    ordinary = host.normal(g, TOKENS, SIZE).bfloat16()
    given = _given(3, experts=4)  # of which 1 and 2 are local
    yield MoECase(
        "Swiglu, biases and parameters, experts 1 and 2 of 4",
        quantize_activations(ordinary, replace(recipe, build="cuda")),
        experts,
        recipe=recipe,
        local_expert_offset=1,
        **given,
    )

    # The second half of K cancels the first but for a sixteenth of the columns.
    states = _bytes(0, 256, TOKENS, SIZE // 2, seed=8)
    scales = torch.full((TOKENS, SIZE // BLOCK_SIZE), 0x60, dtype=torch.uint8, device="cpu")
    scales[:, 1::2] = 0x3C
    states[:, SIZE // 4 :], scales[:, 4:] = states[:, : SIZE // 4], scales[:, :4]
    w13 = _bytes(0, 256, 2, SIZE, SIZE // 2, seed=10)
    w13[..., SIZE // 4 :] = w13[..., : SIZE // 4] ^ 0x88
    w13[..., -4:] = 0x22
    w13[..., SIZE // 4 - 4 : SIZE // 4] = 0x11
    s13 = torch.full((2, SIZE, SIZE // BLOCK_SIZE), _ONE, dtype=torch.uint8, device="cpu")
    cancelling = assemble_experts(
        w13,
        s13,
        host.fp32([0.01, 0.03]),
        _bytes(0, 256, 2, SIZE, SIZE // 2, seed=11),
        s13,
        host.fp32([0.1, 0.1]),
        _A.Identity,
    )
    states_of = Activations(states, scales, 0.5 + host.arange(TOKENS).float() / 10)
    yield MoECase("Identity, sums that cancel", states_of, cancelling, recipe=recipe, **_given(1))

    ordered = _given(8, experts=8)
    weights = host.powers(host.arange(8) * 11 % 40 - 30) * (1 + host.uniform(g, TOKENS, 8))
    experts = _experts(8, _A.Relu2, 60)
    experts = replace(
        experts,
        output2_scale_scalar=experts.output2_scale_scalar
        * host.powers(30 - host.arange(8) * 11 % 40),
    )
    state = quantize_activations(
        host.normal(g, TOKENS, SIZE).bfloat16(), replace(recipe, build="cuda")
    )
    for dtype in (torch.bfloat16, torch.float32):
        given = ordered | {"weights": weights.to(dtype)}
        yield MoECase(
            f"Relu2, {str(dtype)[6:]} weights of any size, to fp32",
            state,
            experts,
            recipe=recipe,
            output_dtype=torch.float32,
            **given,
        )


def half_rows() -> torch.Tensor:
    """Make [14, 80] fp16: rows of any size, also subnormal, with -0 and blocks of zeros."""
    x = host.normal(_g(12), 14, 80) * host.powers(host.arange(14) * 2 - 22)[:, None]
    x[3], x[4, :16], x[5, ::7] = 0, 0, -0.0
    return x.half()
