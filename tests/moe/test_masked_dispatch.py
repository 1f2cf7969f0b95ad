"""`fused_moe_masked` and `nvfp4_quantize_masked`: which backend serves, and what is refused."""

# SPDX-License-Identifier: Apache-2.0
import masked_cases
import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe import fused_moe_masked, nvfp4_quantize_masked
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.masked import fused_moe_masked as reference
from nvfp4_moe.reference.moe.masked import quantize_masked
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

MASKED = torch.tensor(masked_cases.MASKED[0])
MOST = masked_cases.MOST
CASE = moe_cases.make(Shape(9, 144, 80, 4, 1))
X = masked_cases.spread(CASE.x, MASKED, MOST)
QUANTIZE = {"per_token_activation": True}


def test_bf16_rows_are_quantized_first():
    """Also where the hidden size is padded, and by another recipe."""
    wide = torch.nn.functional.pad(X, (0, 256 - 144))
    for recipe in (Recipe(), Recipe("exact", NVFP44Over6Config(256, "MSE"))):
        want = reference(quantize_masked(wide, MASKED, recipe), MASKED, CASE.experts, recipe=recipe)
        got = fused_moe_masked(
            X, MASKED, CASE.experts, fast_math=recipe.math == "fast",
            nvfp4_4over6=recipe.four_over_six,
        )  # fmt: skip
        assert want.any()
        assert_bitwise(got, want, str(recipe))


def test_static_scales_and_unquantized_rows():
    for mode in ("static", "bf16"):
        case = moe_cases.make(Shape(9, 144, 80, 4, 1), mode=mode)
        a = case.activations
        parts = (a.hidden_states, a.block_scales)
        given = Activations(*(masked_cases.spread(t, MASKED, MOST) for t in parts))
        got = fused_moe_masked(
            X, MASKED, case.experts, activation=None if mode == "static" else mode
        )
        assert_bitwise(got, reference(given, MASKED, case.experts), mode)


def test_quantized_rows_are_taken_as_they_are():
    codes, scales, token = nvfp4_quantize_masked(X, MASKED, 1 / 2688, **QUANTIZE)
    codes, scales = (
        torch.nn.functional.pad(t, (0, t.shape[2] * 256 // 144 - t.shape[2]))
        for t in (codes, scales)
    )
    got = fused_moe_masked(
        codes, MASKED, CASE.experts, hidden_states_scale=scales, per_token_scale=token
    )
    assert_bitwise(got, fused_moe_masked(X, MASKED, CASE.experts), "codes")


@pytest.mark.parametrize("capability", [None, (9, 0), (10, 0)])
def test_who_serves(capability):
    """FlashInfer serves neither; the quantizer says why, the layer notes it."""
    want = "reference" if capability is None else "triton"
    quantizer = nvfp4_moe.explain_nvfp4_quantize_masked(
        X, MASKED, 1 / 2688, **QUANTIZE, capability=capability
    )
    layer = nvfp4_moe.explain_fused_moe_masked(X, MASKED, CASE.experts, capability=capability)
    assert quantizer.backend == layer.backend == want
    assert quantizer.reason("flashinfer:cuda") is not None
    assert "no fused layer of masked input" in str(layer)
    assert ("GEMM for sm_90" in str(layer)) == (capability == (9, 0))


def test_flashinfer_refuses_by_the_mask(monkeypatch):
    from installations import pretend

    pretend(monkeypatch)
    told = nvfp4_moe.explain_nvfp4_quantize_masked(
        X.to("meta"), MASKED.to("meta"), 1 / 2688, **QUANTIZE, capability=(10, 0)
    )
    assert "masked_m is given" in told.reason("flashinfer:cuda")


def test_a_registered_backend_gets_codes_and_is_checked():
    def run(call):
        assert call.activations.hidden_states.dtype == torch.uint8
        return torch.ones(call.output_shape, dtype=torch.bfloat16, device="cpu")

    with nvfp4_moe.register_backend("fused_moe_masked", "mine", run):
        got = fused_moe_masked(X, MASKED, CASE.experts, backend="mine")
        assert got.shape == (4, MOST, 144) and bool((got == 1).all())
    wrong = nvfp4_moe.register_backend("fused_moe_masked", "mine", lambda call: run(call)[0])
    with wrong, pytest.raises(ValueError, match="the result of backend mine"):
        fused_moe_masked(X, MASKED, CASE.experts, backend="mine")


def test_tiles_of_block_scales_have_rows_of_one_expert():
    for layout in (SfLayout.layout_8x4, SfLayout.layout_128x4):
        with pytest.raises(
            ValueError, match=f"sfLayout is {layout.name} .* max_m must be a multiple"
        ):
            nvfp4_quantize_masked(X, MASKED, 9.0, layout)


def test_one_scale_of_each_expert():
    scales = torch.tensor([9.0, 3.0, 2688.0, 0.5])
    codes, sf = nvfp4_quantize_masked(X, MASKED, scales)
    for e, rows in enumerate(MASKED.tolist()):
        want = nvfp4_moe.nvfp4_quantize(X[e, :rows], scales[e].item(), SfLayout.layout_linear)
        assert_bitwise(codes[e, :rows], want[0], f"codes of {e}")
        assert_bitwise(sf[e, :rows], want[1], f"block scales of {e}")


def test_codes_and_an_activation_contradict_each_other():
    codes, scales, token = nvfp4_quantize_masked(X, MASKED, 1 / 2688, **QUANTIZE)
    codes, scales = torch.zeros(4, MOST, 128).byte(), torch.zeros(4, MOST, 16).byte()
    with pytest.raises(ValueError, match="activation is 'bf16'; it must be None with codes"):
        fused_moe_masked(
            codes, MASKED, CASE.experts, hidden_states_scale=scales, per_token_scale=token,
            activation="bf16",
        )  # fmt: skip
