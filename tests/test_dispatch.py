"""The one call: what it refuses, which backend it takes, and what it says about the others."""

# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch
from assertions import assert_bitwise
from nvfp4_moe.kernels import dispatch, environment
from nvfp4_moe.kernels import flashinfer as fi
from nvfp4_moe.reference import layouts, quantize, shuffle
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

import nvfp4_moe

G = 1 / 2688
ON_BLACKWELL = {"capability": (10, 0)}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fi, "INSTALLED", True)


def meta(m=256, k=4096, dtype=torch.bfloat16):
    return torch.empty(m, k, dtype=dtype, device="meta")


def per_token(x=None, **options):
    x = meta() if x is None else x
    return nvfp4_moe.explain(x, G, per_token_activation=True, **options)


# --- which backend


def test_auto_takes_flashinfers_backend_of_the_build_on_blackwell():
    assert per_token(**ON_BLACKWELL).backend == "flashinfer:cuda"
    assert per_token(build="cute-dsl", **ON_BLACKWELL).backend == "flashinfer:cute-dsl"


def test_auto_takes_triton_below_blackwell_and_the_reference_without_a_gpu():
    assert per_token(capability=(9, 0)).backend == "triton"
    assert per_token(capability=(8, 0)).backend == "triton"
    assert per_token(capability=(7, 5)).backend == "reference"
    assert per_token(torch.zeros(2, 32).bfloat16()).backend == "reference"


def test_auto_without_flashinfer(monkeypatch):
    monkeypatch.setattr(fi, "INSTALLED", False)
    explanation = per_token(**ON_BLACKWELL)
    assert explanation.backend == "triton"
    assert "nvfp4-moe[flashinfer]" in explanation.reason("flashinfer:cuda")


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("flashinfer:cuda", {"x": meta(dtype=torch.float32), **ON_BLACKWELL}, "a is float32"),
        ("reference", {"x": meta(k=24), **ON_BLACKWELL}, "K = 24"),
        ("flashinfer:cuda", {"capability": (9, 0)}, "sm_90 is before Blackwell"),
        (
            "flashinfer:cake",
            {"nvfp4_4over6": NVFP44Over6Config(), "build": "cute-dsl", **ON_BLACKWELL},
            "no 4over6",
        ),
        ("triton", {"x": torch.zeros(2, 32).bfloat16()}, "a is on the cpu"),
        ("flashinfer:cuda", {"out_scale": torch.ones(1), **ON_BLACKWELL}, "out_scale"),
        (
            "flashinfer:cuda",
            {"fast_math": False, **ON_BLACKWELL},
            "set FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1",
        ),
    ],
)
def test_the_reasons(backend, options, reason):
    assert reason in per_token(**options).reason(backend)


def test_the_environment_decides_and_is_named(monkeypatch):
    monkeypatch.setenv("TRTLLM_DISABLE_FP4_QUANT_FAST_MATH", "1")
    assert per_token(**ON_BLACKWELL).backend == "flashinfer:cuda"  # exact, as it says
    told = per_token(fast_math=True, **ON_BLACKWELL).reason("flashinfer:cuda")
    assert "unset TRTLLM_DISABLE_FP4_QUANT_FAST_MATH" in told
    # CuTe-DSL does not read the older name.
    assert (
        per_token(fast_math=True, build="cute-dsl", **ON_BLACKWELL).backend == "flashinfer:cute-dsl"
    )


def test_4over6_from_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_E4M3_USE_256", "1")
    x = torch.randn(4, 64).bfloat16()
    recipe = Recipe("fast", NVFP44Over6Config(256))
    want = quantize.quantize_per_token(x, recipe.base_scale_inv, recipe)
    got = nvfp4_moe.nvfp4_quantize(x, 1 / 1536, SfLayout.layout_linear, per_token_activation=True)
    assert_bitwise(got[0], want.codes, "codes")


RULE_CASES = {
    "flashinfer:cuda": [
        {"x": torch.zeros(2, 32).bfloat16()},
        {"capability": (9, 0)},
        {"x": meta(dtype=torch.float32)},
        {"capability": (10, 1)},
        {"build": "cute-dsl"},
        {"fast_math": False},
        {"out_scale": torch.ones(1)},
        {"x": meta(4096, 4096).T},
        {"x": meta(m=0)},
        {"x": meta(2**21, 2**15)},
        {"a_global_sf": torch.empty(1, device="meta")},
    ],
    "flashinfer:cute-dsl": [
        {"x": torch.zeros(2, 32).bfloat16()},
        {"capability": (9, 0)},
        {"x": meta(dtype=torch.float32)},
        {},
        {"fast_math": False, "build": "cute-dsl"},
        {"build": "cute-dsl", "expanded_idx_to_permuted_idx": torch.zeros(256, dtype=torch.int32)},
        {"build": "cute-dsl", "per_token_activation": False, "a_global_sf": torch.ones(256)},
        {"build": "cute-dsl", "x": meta(m=0)},
        {"build": "cute-dsl", "x": meta(2**20, 2**15)},
    ],
    "flashinfer:cake": [
        {"x": torch.zeros(2, 32).bfloat16()},
        {"capability": (9, 0)},
        {"x": meta(dtype=torch.float32)},
        {"capability": (12, 0)},
        {},
        {"build": "cute-dsl", "fast_math": False},
        {"build": "cute-dsl", "per_token_activation": False},
        {"build": "cute-dsl", "nvfp4_4over6": NVFP44Over6Config()},
        {"build": "cute-dsl", "sfLayout": SfLayout.layout_linear},
        {"build": "cute-dsl", "expanded_idx_to_permuted_idx": torch.zeros(256, dtype=torch.int32)},
        {"build": "cute-dsl", "enable_pdl": False},
        {"build": "cute-dsl", "x": meta(m=0)},
        {"build": "cute-dsl", "x": meta(2**20, 2**15)},
    ],
}


@pytest.mark.parametrize("backend", fi.RULES)
def test_every_rule_is_triggered(backend, monkeypatch):
    def triggered(options):
        x = options.get("x", meta())
        given = {"a_global_sf": G, "per_token_activation": True, **options}
        given.pop("x", None)
        if x.device.type == "meta":
            given.setdefault("capability", (10, 0))
        return nvfp4_moe.explain(x, **given).reason(backend)

    reasons = {triggered(options) for options in RULE_CASES[backend]}
    monkeypatch.setattr(fi, "INSTALLED", False)
    reasons.add(triggered({}))
    assert None not in reasons
    assert len(reasons) == len(fi.RULES[backend])


# --- what every backend refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(4, 24).bfloat16()}, "K = 24; K must be a positive multiple of 16"),
        ({"a": torch.zeros(4, 0).bfloat16()}, "K = 0"),
        ({"a": torch.zeros(2, 4, 32).bfloat16()}, r"shape \(2, 4, 32\); it must be \[M, K\]"),
        ({"a": torch.zeros(4, 32).int()}, "a is torch.int32"),
        ({"a": [1.0]}, "a is a list"),
        ({"sf_vec_size": 32}, "sf_vec_size is 32"),
        ({"sfLayout": 7}, "sfLayout is 7; it must be one of layout_128x4"),
        ({"a_global_sf": "1"}, "a_global_sf is a str"),
        ({"a_global_sf": torch.ones(3)}, "a_global_sf has 3 elements"),
        ({"nvfp4_4over6": NVFP44Over6Config(256)}, "with e4m3_max 256 it must be"),
        ({"nvfp4_4over6": 5}, "nvfp4_4over6 is 5"),
        ({"backend": "marlin"}, "backend is 'marlin'; it must be one of auto"),
        ({"build": "hip"}, "build is 'hip'"),
        ({"do_shuffle": True}, "M a multiple of 128"),
        ({"do_shuffle": True, "sfLayout": SfLayout.layout_8x4}, "needs layout_128x4"),
        ({"expanded_idx_to_permuted_idx": torch.zeros(4)}, "must be int32 and 1-D"),
        ({"expanded_idx_to_permuted_idx": torch.zeros(3, dtype=torch.int32)}, "at least M = 4"),
        ({"out_scale": torch.ones(2)}, "out_scale has 2 elements"),
        (
            {"per_token_activation": False, "out_scale": torch.ones(1)},
            "out_scale is given; it needs",
        ),
        (
            {
                "per_token_activation": False,
                "expanded_idx_to_permuted_idx": torch.zeros(4, dtype=torch.int32),
            },
            "expanded_idx_to_permuted_idx is given; it needs",
        ),
        ({"a": torch.zeros(4, 32).to(torch.float8_e4m3fn)}, "per-token quantization takes"),
        ({"a": torch.zeros(4, 32), "fast_math": False}, "its only recipe is fast math"),
        ({"a": torch.zeros(4, 32), "per_token_activation": False}, "a global scale takes"),
    ],
)
def test_bad_arguments(change, message):
    given = {"a": torch.zeros(4, 32).bfloat16(), "a_global_sf": G, "per_token_activation": True}
    with pytest.raises((TypeError, ValueError), match=message):
        nvfp4_moe.nvfp4_quantize(**(given | change))


def test_a_named_backend_never_falls_back():
    x = torch.zeros(4, 32).bfloat16()
    for backend in ("triton", "flashinfer", "cuda", "cute-dsl", "cake"):
        with pytest.raises(nvfp4_moe.UnsupportedError, match="a is on the cpu"):
            nvfp4_moe.nvfp4_quantize(x, G, backend=backend, per_token_activation=True)


# --- results


@pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)
def test_shapes_are_flashinfers(layout):
    x = torch.randn(130, 80).bfloat16()
    codes, scales, token = nvfp4_moe.nvfp4_quantize(x, G, layout, per_token_activation=True)
    padded = {0: (256, 8), 1: (136, 8), 2: (130, 5)}[int(layout)]
    assert (codes.shape, scales.shape, token.shape) == ((130, 40), padded, (130,))
    assert (codes.dtype, scales.dtype, token.dtype) == (torch.uint8, torch.uint8, torch.float32)
    assert len(nvfp4_moe.nvfp4_quantize(x, 9.0, layout)) == 2


def test_do_shuffle_reorders_rows():
    x = torch.randn(128, 64).bfloat16()
    q = quantize.quantize_per_token(x, G, Recipe())
    order = shuffle.shuffle_rows(128)
    got = nvfp4_moe.nvfp4_quantize(x, G, do_shuffle=True, per_token_activation=True)
    assert_bitwise(got[0], q.codes[order], "codes")
    assert_bitwise(got[1], layouts.from_linear(q.block_scales[order], SfLayout.layout_128x4), "sf")
    assert_bitwise(got[2], q.per_token_scale[order], "per-token scales")


def test_explain_is_readable_and_marks_what_is_not_proven():
    text = str(per_token(build="cute-dsl", out_scale=torch.ones(1), **ON_BLACKWELL))
    assert "would run: flashinfer:cute-dsl" in text
    assert "not proven on FlashInfer, derived from its source: out_scale" in text
    assert [line.split()[0] for line in text.splitlines()[1:6]] == list(dispatch.BACKENDS)


# --- FlashInfer itself


def test_flashinfers_signature_is_the_one_we_call():
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    theirs = list(inspect.signature(flashinfer.nvfp4_quantize).parameters.values())
    ours = list(inspect.signature(nvfp4_moe.nvfp4_quantize).parameters.values())
    assert [p.name for p in theirs] == [p.name for p in ours[: len(theirs)]], "FlashInfer changed"
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    for a, b in zip(theirs, ours, strict=False):
        if a.name not in ("backend", "nvfp4_4over6"):
            assert a.default == b.default, f"FlashInfer's default of {a.name} changed"
    from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config as Theirs
    from flashinfer.quantization.nvfp4_quantization_utils import nvfp4_4over6_code
    from flashinfer.tllm_enums import SfLayout as TheirLayout

    assert {e.name: e.value for e in TheirLayout} == {e.name: e.value for e in SfLayout}
    for code in (1, 3, 5, 7, 17, 19, 21, 23):
        config = Recipe.from_code(code).four_over_six
        theirs_config = Theirs(config.e4m3_max, int(config.err_mode), config.err_use_fast_math)
        assert nvfp4_4over6_code(theirs_config) == code
        assert NVFP44Over6Config.of(theirs_config) == config


@pytest.mark.parametrize("build", ["cuda", "cute-dsl"])
@pytest.mark.parametrize("mode", ["per token", "global"])
def test_the_arguments_that_flashinfer_gets(build, mode, monkeypatch):
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    seen = {}

    def record(*args, **kwargs):
        seen.update(inspect.signature(real).bind(*args, **kwargs).arguments)
        return torch.zeros(1), torch.zeros(1), torch.zeros(1)

    real = inspect.unwrap(flashinfer.nvfp4_quantize)
    monkeypatch.setattr(flashinfer, "nvfp4_quantize", record)
    backend = f"flashinfer:{build}"
    x = torch.zeros(4, 32).bfloat16()
    request = dispatch.make_request(
        x, G, SfLayout.layout_8x4, False, 16, None, mode == "per token", None, None,
        NVFP44Over6Config(448, "MSE"), True, build, (10, 0),
    )  # fmt: skip
    assert dispatch.refusal(backend, request) is None
    dispatch.run(backend, request)
    assert (seen["a"] is x, seen["backend"], seen["sfLayout"].name) == (True, build, "layout_8x4")
    assert seen["per_token_activation"] == (mode == "per token")
    assert type(seen["nvfp4_4over6"]).__module__.startswith("flashinfer")
    assert int(seen["nvfp4_4over6"].err_mode) == 1
    if build == "cuda" and mode == "per token":  # a tensor would cost .item()
        assert seen["a_global_sf"] == G
    else:
        assert_bitwise(seen["a_global_sf"], torch.full((1,), G), "a_global_sf")


def test_flashinfers_own_objects_are_accepted():
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    from flashinfer.quantization.nvfp4_quantization_utils import _UNSET
    from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config as Theirs
    from flashinfer.tllm_enums import SfLayout as TheirLayout

    x = torch.randn(4, 64).bfloat16()
    for theirs, ours in ((Theirs(), NVFP44Over6Config()), (_UNSET, None), (None, None)):
        a, b = (
            nvfp4_moe.nvfp4_quantize(x, G, layout, per_token_activation=True, nvfp4_4over6=config)
            for layout, config in ((TheirLayout.layout_8x4, theirs), (SfLayout.layout_8x4, ours))
        )
        for i in range(3):
            assert_bitwise(a[i], b[i], "FlashInfer's objects")
