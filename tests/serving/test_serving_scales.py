"""SGLang's scalars: its own two functions where it is installed, and the formulas everywhere."""

# SPDX-License-Identifier: Apache-2.0
import ast
import math

import pytest
import torch
from assertions import assert_bitwise
from server_sources import source_of

from nvfp4_moe.reference.activation import ActivationType, activate
from nvfp4_moe.reference.weights.prepare import assemble_experts
from nvfp4_moe.serving import serving_scales

KINDS = [ActivationType.Swiglu, ActivationType.Geglu, ActivationType.Situ, ActivationType.Relu2]
E = 6


def scales_of(seed: int = 0, columns: int | None = 2) -> dict[str, torch.Tensor]:
    """Return the scales of a checkpoint with 6 local experts of 8: numbers whose products round."""
    g = torch.Generator().manual_seed(seed)
    w13 = (E,) if columns is None else (E, columns)
    return {
        "w13_weight_scale_2": torch.rand(w13, generator=g) * 1e-3,
        "w2_weight_scale_2": torch.rand(E, generator=g) * 1e-3,
        "w13_input_scale": torch.rand(8, 2, generator=g) + 1e-3,
        "w2_input_scale": torch.rand(8, generator=g) + 1e-3,
    }


def functions(path: str, *names: str) -> dict:
    """Functions of a file of SGLang's that need torch alone, without its imports."""
    tree = ast.parse(source_of("sglang", path))
    body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(body) == len(names), f"{path} has no {names}"
    future = ast.parse("from __future__ import annotations").body
    space: dict = {"torch": torch}
    exec(compile(ast.Module([*future, *body], []), path, "exec"), space)
    return space


@pytest.mark.parametrize("activation", ["per-token", "static"])
@pytest.mark.parametrize(
    ("kind", "columns"),
    [(kind, c) for kind in KINDS for c in (None, 1, 2) if kind.linear_up or c != 2],
    ids=str,
)
def test_equal_to_what_sglang_computes(kind, columns, activation):
    space = functions("srt/layers/quantization/modelopt_quant.py", "_compute_gemm1_alphas")
    space |= functions("srt/layers/moe/moe_runner/flashinfer_trtllm.py", "_compute_g1_scale_c")
    c = scales_of(columns=columns)
    a13, a2 = c["w13_input_scale"].max(), c["w2_input_scale"].max()
    if activation == "per-token":
        a13, a2 = torch.ones_like(a13), torch.ones_like(a2)
    gate, up = space["_compute_gemm1_alphas"](c["w13_weight_scale_2"], a13, kind.gated)
    want_c = space["_compute_g1_scale_c"](
        1 / a2, gate, up, kind.gated, "situ" if kind == ActivationType.Situ else "silu"
    )
    got = serving_scales(**c, activation=activation, kind=kind)
    assert_bitwise(got.g1_alphas, gate, "g1_alphas")
    assert_bitwise(got.g1_alphas_up, up, "g1_alphas_up")
    assert_bitwise(got.g1_scale_c, want_c, "g1_scale_c")


@pytest.mark.parametrize("seed", range(5))
def test_the_formulas(seed):
    c = scales_of(seed)
    gate, up = c["w13_weight_scale_2"].unbind(1)
    per_token = serving_scales(**c, activation="per-token")
    assert_bitwise(per_token.g1_alphas, gate, "g1_alphas")
    assert_bitwise(per_token.g1_scale_c, up, "g1_scale_c")
    assert_bitwise(per_token.g2_alphas, c["w2_weight_scale_2"], "g2_alphas")
    assert per_token.w13_input_scale_quant == per_token.w2_input_scale_quant == 1

    a13, a2 = c["w13_input_scale"].max(), c["w2_input_scale"].max()
    static = serving_scales(**c, activation="static")
    assert_bitwise(static.g1_alphas, a13 * gate, "g1_alphas")
    assert_bitwise(static.g1_scale_c, (1 / a2) * (a13 * up), "g1_scale_c")
    assert_bitwise(static.g2_alphas, a2 * c["w2_weight_scale_2"], "g2_alphas")
    assert static.w13_input_scale_quant == 1 / a13 and static.w2_input_scale_quant == 1 / a2
    assert not torch.equal(static.g1_alphas, static.g1_alphas_up)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("activation", ["per-token", "static"])
def test_equal_to_the_scalars_of_assembled_experts(kind, activation):
    """To the bit per token; our static ones divide by the encode scale, SGLang's multiply."""
    c = scales_of(3, 2 if kind.linear_up else None)
    rows = 128 if kind.gated else 64
    codes1 = torch.zeros(E, rows, 64, dtype=torch.uint8)
    codes2 = torch.zeros(E, 128, 32, dtype=torch.uint8)
    sf1, sf2 = (
        torch.zeros(*m.shape[:2], m.shape[2] // 8, dtype=torch.uint8) for m in (codes1, codes2)
    )
    decode = c["w13_weight_scale_2"]
    static = {}
    if activation == "static":
        static = {
            "input_amax": c["w13_input_scale"].max().item() * 2688,
            "intermediate_amax": c["w2_input_scale"].max().item() * 2688,
        }
    experts = assemble_experts(
        codes1,
        sf1,
        decode.flip(1) if kind.linear_up else decode,  # (up, gate)
        codes2,
        sf2,
        c["w2_weight_scale_2"],
        kind,
        **static,
    )
    got = serving_scales(**c, activation=activation, kind=kind)
    pairs = {
        "g1_scale_c": experts.output1_scale_scalar,
        "g1_alphas": experts.output1_scale_gate_scalar,
        "g2_alphas": experts.output2_scale_scalar,
    }
    for name, want in pairs.items():
        if activation == "per-token":
            assert_bitwise(getattr(got, name), want, name)
        else:
            ulps = (getattr(got, name).view(torch.int32) - want.view(torch.int32)).abs()
            assert ulps.max() <= 2, name


def test_a_limit_is_in_the_domain_of_the_accumulator():
    c = scales_of(columns=None)
    got = serving_scales(**c, activation="static", clamp_limit=7.0)
    assert got.block_scale_ratios is None
    assert_bitwise(got.gemm1_clamp_limit, 7.0 / got.g1_alphas, "limit")
    sf = torch.full((E, 32, 4), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert got.tied(sf) is sf
    for kind in (ActivationType.Situ, ActivationType.Relu2):
        scales = serving_scales(**c, activation="static", kind=kind, clamp_limit=7.0)
        assert scales.gemm1_clamp_limit is None


def apart() -> dict[str, torch.Tensor]:
    return scales_of() | {
        "w13_weight_scale_2": torch.tensor([[0.5, 0.125], [0.25, 1.0], [0.5, 0.5]]),
        "w2_weight_scale_2": torch.ones(3),
    }


@pytest.mark.parametrize("kind", [k for k in ActivationType if k.gated], ids=lambda k: k.name)
def test_which_activations_want_one_scale_of_gate_and_up(kind):
    """SiTU multiplies both halves by one scalar; SwigluStep has a limit where none is given."""
    got = serving_scales(**apart(), activation="per-token", kind=kind)
    if kind in (ActivationType.Situ, ActivationType.SwigluStep):
        assert got.block_scale_ratios.tolist() == [[0.25, 1.0], [1.0, 0.25], [1.0, 1.0]]
        assert got.g1_alphas.tolist() == got.g1_alphas_up.tolist() == [0.5, 1.0, 0.5]
    else:
        assert got.block_scale_ratios is None
        assert got.g1_alphas_up.tolist() == [0.125, 1.0, 0.5]


def test_gate_and_up_apart_are_tied_where_one_limit_clamps_both():
    """The kernel's limit is in the accumulator's domain: one number for two halves."""
    c = apart()
    got = serving_scales(**c, activation="per-token", clamp_limit=2.0)
    assert got.g1_alphas.tolist() == got.g1_alphas_up.tolist() == got.g1_scale_c.tolist()
    assert got.g1_alphas.tolist() == [0.5, 1.0, 0.5]
    assert got.block_scale_ratios.tolist() == [[0.25, 1.0], [1.0, 0.25], [1.0, 1.0]]
    assert got.gemm1_clamp_limit.tolist() == [4.0, 2.0, 4.0]

    # A layer of one block: code 1, block scales 8, so that up = 8 * 0.125 * 16 stays below no limit.
    sf = torch.full((3, 4, 1), 8.0).to(torch.float8_e4m3fn)
    tied = got.tied(sf).float()
    for e, (gate, up) in enumerate(c["w13_weight_scale_2"].tolist()):
        raw = torch.cat([tied[e, :2, 0], tied[e, 2:, 0]])[None] * 4.0
        y = activate(
            raw,
            ActivationType.Swiglu,
            got.g1_scale_c[e],
            got.g1_alphas[e],
            clamp_limit=got.gemm1_clamp_limit[e],
        )
        physical = torch.tensor([[32.0 * up] * 2 + [32.0 * gate] * 2])
        want = activate(physical, ActivationType.Swiglu, clamp_limit=2.0)
        assert torch.equal(y, want), e


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "bf16"}, "activation is 'bf16'; it must be one of per-token, static"),
        ({"activation": None}, "activation is None; it must be one of per-token, static"),
        ({"kind": 3}, "kind is 3; it must be an ActivationType"),
        (
            {"w13_weight_scale_2": [1.0] * E},
            "w13_weight_scale_2 is a list of 6; it must be a tensor",
        ),
        (
            {"w13_weight_scale_2": -torch.ones(E)},
            r"w13_weight_scale_2\[0\] is -1\.0.*0 or above",
        ),
        (
            {"w2_weight_scale_2": torch.ones(E) / 0},
            r"w2_weight_scale_2\[0\] is inf.*finite, 0 or above",
        ),
        ({"w2_weight_scale_2": torch.ones(E).int()}, "w2_weight_scale_2 is int32 .*; it must be"),
        ({"w13_input_scale": None}, "w13_input_scale is None; it must be a tensor"),
        ({"w13_input_scale": torch.ones(0)}, "w13_input_scale is float32 .0.; it must be"),
        *(
            ({"clamp_limit": limit}, "clamp_limit is .*; it must be ")
            for limit in (-1.0, math.nan, 1e39, "7", True)
        ),
        (
            {"w13_weight_scale_2": torch.ones(E, 3)},
            r"w13_weight_scale_2 has shape \(6, 3\); it must be \[E\], \[E, 1\] or \[E, 2\]",
        ),
        (
            {"kind": ActivationType.Relu2},
            r"w13_weight_scale_2 has shape \(6, 2\); it must be \[E\] or \[E, 1\] without a gate",
        ),
        ({"w2_weight_scale_2": torch.ones(5)}, r"w2_weight_scale_2 has shape \(5,\)"),
        ({"w13_input_scale": torch.zeros(8, 2)}, "w13_input_scale is 0.0 at most"),
        ({"w13_input_scale": torch.full((8, 2), 1e-39)}, "w13_input_scale is .* reciprocals"),
        ({"w2_input_scale": torch.tensor([1, torch.nan])}, "w2_input_scale is nan at most"),
        ({"w2_input_scale": torch.tensor([1, torch.inf])}, "w2_input_scale is inf at most"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        serving_scales(**{**scales_of(), "activation": "static", **change})


def test_per_token_does_not_read_the_checkpoints_scales():
    c = scales_of()
    want = serving_scales(**c, activation="per-token")
    c |= {"w13_input_scale": torch.tensor(torch.nan), "w2_input_scale": torch.tensor(0.0)}
    got = serving_scales(**c, activation="per-token")
    assert_bitwise(got.g1_scale_c, want.g1_scale_c, "g1_scale_c")
