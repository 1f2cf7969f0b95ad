"""One call: what it rejects, which backend it takes and why, what it returns. No GPU needed."""

# SPDX-License-Identifier: Apache-2.0
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_bitwise, assert_quantized
from installations import pretend
from invalid_quantize_calls import FOUR, FOUR_256, INDEX, INVALID, TOKEN, G, X

import nvfp4_moe
from nvfp4_moe import SfLayout, UnsupportedError, explain, nvfp4_quantize
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels import backends, environment, triton_target
from nvfp4_moe.kernels.device import check_capability
from nvfp4_moe.kernels.flashinfer import quantize as fi
from nvfp4_moe.kernels.quantize import api as quantize_api
from nvfp4_moe.kernels.quantize.call import UNSET
from nvfp4_moe.kernels.quantize.launch import launch_config
from nvfp4_moe.reference import layouts
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.layouts import shuffle_rows
from nvfp4_moe.reference.recipe import Recipe, all_recipes

NEW, OLD = environment.EXACT_VARIABLES["cuda"]
ROOT = Path(nvfp4_moe.__file__).parent.parent


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(triton_target, "INTERPRETING", False)


@pytest.fixture
def flashinfer_here(monkeypatch):
    """As on a machine where every FlashInfer backend is installed completely."""
    pretend(monkeypatch)


def meta(m=128, k=192, dtype=torch.bfloat16):
    return torch.empty(m, k, dtype=dtype, device="meta")


# What no backend accepts

BACKEND_NAMES = (
    *("auto", "reference", "triton", "flashinfer"),
    *("flashinfer:cuda", "flashinfer:cute-dsl", "flashinfer:cake"),
    *("cuda", "cute-dsl", "cake"),
)


@pytest.mark.parametrize("case", INVALID)
def test_invalid_is_one_error_on_every_backend(case):
    change, error, message = INVALID[case]
    arguments = {"a": X, "a_global_sf": G, **TOKEN, "build": "cuda"} | change
    texts = set()
    for backend in BACKEND_NAMES:
        with pytest.raises(error, match=message) as raised:
            nvfp4_quantize(**arguments, backend=backend)
        assert not isinstance(raised.value, UnsupportedError)
        texts.add(str(raised.value))
    assert len(texts) == 1


@pytest.mark.parametrize("case", INVALID)
def test_explain_of_the_invalid_has_the_reason_for_every_backend(case):
    change, _, _ = INVALID[case]
    arguments = {"a": X, "a_global_sf": G, **TOKEN} | change
    with pytest.raises((TypeError, ValueError)) as raised:
        nvfp4_quantize(**arguments)
    explanation = explain(**arguments)
    assert explanation.backend is None
    assert explanation.reasons == tuple((b, str(raised.value)) for b in quantize_api.BACKENDS)
    assert str(explanation).startswith("would run: nothing\n")


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"backend is 'cutlass'; it must be one of auto, flashinfer"
    ):
        nvfp4_quantize(X, G, backend="cutlass")


def test_what_the_environment_chose_is_named(monkeypatch):
    monkeypatch.setenv(OLD, "1")
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    with pytest.raises(ValueError, match=f"{OLD} and FLASHINFER_NVFP4_4OVER6 in the environment"):
        nvfp4_quantize(X.float(), G, **TOKEN)


def test_an_omitted_recipe_takes_any_base_scale():
    for scale in (1.0, torch.ones(1)):
        codes, _, token = nvfp4_quantize(X, scale, **TOKEN)
        assert_quantized(
            (codes, _, token), reference.quantize_per_token(X, 1.0, Recipe(), SfLayout(0)), "1.0"
        )


# Reasons and choices

REASONS = {
    "fp32": (meta(dtype=torch.float32), TOKEN, (10, 0), fi.BUILDS, "a is float32"),
    "K 24": (meta(k=24), TOKEN, (10, 0), quantize_api.BACKENDS, "K = 24; .*multiple of 16"),
    "sm_90": (meta(), TOKEN, (9, 0), ["flashinfer:cuda"], "sm_90 is before Blackwell"),
    "4over6 with cake": (
        meta(),
        TOKEN | {"nvfp4_4over6": FOUR, "build": "cute-dsl"},
        (10, 0),
        ["flashinfer:cake"],
        "no 4over6",
    ),
    "a CPU tensor with triton": (X, TOKEN, None, ["triton"], "a is on the cpu; Triton runs on"),
    "out_scale with cuda": (
        meta(),
        TOKEN | {"out_scale": torch.ones(1)},
        (10, 0),
        ["flashinfer:cuda"],
        "out_scale is only for cute-dsl and cake",
    ),
    "exact while the environment says fast": (
        meta(),
        TOKEN | {"fast_math": False},
        (10, 0),
        ["flashinfer:cuda"],
        f"which says fast, not exact: set {NEW}=1",
    ),
    "sm_75 with triton": (meta(), TOKEN, (7, 5), ["triton"], "sm_75 is before sm_80"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(flashinfer_here, case):
    a, arguments, capability, backends, reason = REASONS[case]
    explanation = explain(a, G, **arguments, capability=capability)
    for backend in backends:
        text = explanation.reason(backend)
        assert text is not None, f"{backend} can serve"
        assert re.search(reason, text), text
        assert f"  {backend:<19}  no: {text}" in str(explanation).splitlines()


@pytest.mark.parametrize(
    ("capability", "build", "expected"),
    [
        ((10, 0), None, "flashinfer:cuda"),
        ((10, 0), "cuda", "flashinfer:cuda"),
        ((10, 0), "cute-dsl", "flashinfer:cute-dsl"),
        ((12, 1), None, "flashinfer:cuda"),
        ((9, 0), None, "triton"),
        ((8, 0), "cute-dsl", "triton"),
        ((7, 5), None, "reference"),
        (None, None, "reference"),
    ],
)
def test_auto(flashinfer_here, capability, build, expected):
    explanation = explain(meta(), G, **TOKEN, build=build, capability=capability)
    assert explanation.backend == expected and explanation.reason(expected) is None
    assert str(explanation).startswith(f"would run: {expected}\n")


def test_auto_tries_one_order_without_cake():
    assert quantize_api.auto_order("cuda") == ("flashinfer:cuda", "triton", "reference")
    assert quantize_api.auto_order("cute-dsl") == ("flashinfer:cute-dsl", "triton", "reference")


def test_auto_without_flashinfer_or_triton(monkeypatch):
    pretend(monkeypatch, version=None)
    assert explain(meta(), G, **TOKEN, capability=(10, 0)).backend == "triton"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    explanation = explain(meta(), G, **TOKEN, capability=(10, 0))
    assert explanation.backend == "reference"
    assert explanation.reason("triton") == "triton is not installed"


@pytest.mark.parametrize("build", ["cuda", "cute-dsl"])
def test_auto_falls_to_triton_where_flashinfer_refuses(flashinfer_here, build):
    other = {"out_scale": torch.ones(1)} if build == "cuda" else {}
    other |= {"expanded_idx_to_permuted_idx": INDEX} if build == "cute-dsl" else {}
    explanation = explain(meta(), G, **TOKEN, **other, build=build, capability=(10, 0))
    assert explanation.backend == "triton"


@pytest.mark.parametrize(
    ("backend", "build", "chosen"),
    [
        ("flashinfer", None, "flashinfer:cuda"),
        ("flashinfer", "cute-dsl", "flashinfer:cute-dsl"),
        ("cuda", None, "flashinfer:cuda"),
        ("cute-dsl", None, "flashinfer:cute-dsl"),
        ("cake", None, "flashinfer:cake"),
        ("flashinfer:cake", "cute-dsl", "flashinfer:cake"),
        ("cuda", "cute-dsl", None),
        ("flashinfer:cute-dsl", "cuda", None),
        ("triton", "cute-dsl", "triton"),
        ("reference", None, "reference"),
    ],
)
def test_named(flashinfer_here, backend, build, chosen):
    arguments = TOKEN | {"backend": backend, "build": build}
    assert explain(meta(), G, **arguments, capability=(10, 0)).backend == chosen


def test_build_of_a_named_backend_decides_the_bits(flashinfer_here, monkeypatch):
    # cute-dsl does not read the older variable, so the same call is fast there and exact here.
    monkeypatch.setenv(OLD, "1")
    ran = []
    monkeypatch.setattr(quantize_api.QUANTIZE, "refusal", lambda backend, request: None)
    monkeypatch.setattr(
        quantize_api.QUANTIZE, "run", lambda backend, r: ran.append((backend, r.recipe))
    )
    for backend in ("cuda", "cute-dsl", "cake", "triton"):
        nvfp4_quantize(X, G, **TOKEN, backend=backend)
    assert ran == [
        ("flashinfer:cuda", Recipe("exact")),
        ("flashinfer:cute-dsl", Recipe(build="cute-dsl")),
        ("flashinfer:cake", Recipe(build="cute-dsl")),
        ("triton", Recipe("exact")),
    ]


@pytest.mark.parametrize("backend", ["triton", *fi.BUILDS])
def test_a_named_backend_never_falls_back(flashinfer_here, monkeypatch, backend):
    monkeypatch.setattr(quantize_api.QUANTIZE, "run", lambda *args: pytest.fail("something ran"))
    with pytest.raises(UnsupportedError, match=f"backend {backend} .*: a is on the cpu"):
        nvfp4_quantize(X, G, **TOKEN, backend=backend)
    assert explain(X, G, **TOKEN, backend=backend).backend is None


def test_auto_never_picks_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_target, "INTERPRETING", True)
    ran = []
    monkeypatch.setattr(quantize_api.QUANTIZE, "run", lambda backend, request: ran.append(backend))
    explanation = explain(X, G, **TOKEN)
    assert explanation.reason("triton") is None and explanation.backend == "reference"
    assert explain(X, G, **TOKEN, backend="triton").backend == "triton"
    nvfp4_quantize(X, G, **TOKEN)
    nvfp4_quantize(X, G, **TOKEN, backend="triton")
    assert ran == ["reference", "triton"]


def test_meta_tensors_are_explained():
    arguments = TOKEN | {"a_global_sf": torch.ones(1, device="meta"), "build": "cute-dsl"}
    arguments |= {"out_scale": torch.ones(1), "expanded_idx_to_permuted_idx": INDEX}
    explanation = explain(meta(), **arguments, capability=(9, 0))
    assert explanation.backend == "triton"
    assert explain(meta(), G).backend == "reference"  # on no GPU


def test_a_refusal_on_blackwell_is_logged_once(monkeypatch, caplog):
    pretend(monkeypatch, version=None)
    backends.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "nvfp4_moe"):
        explain(meta(), G, **TOKEN, capability=(9, 0))
        assert not caplog.records
        for _ in range(3):
            explain(meta(), G, **TOKEN, capability=(10, 0))
    assert len(caplog.records) == 1
    assert "flashinfer:cuda cannot serve" in caplog.text and "not installed" in caplog.text


def test_what_is_not_proven_is_noted():
    explanation = explain(X, G, **TOKEN, do_shuffle=True)
    (note,) = explanation.notes
    assert note == "not proven on FlashInfer, derived from its source: do_shuffle"
    assert f"note: {note}" in str(explanation).splitlines()


def test_the_batch_invariant_quantizers_are_refused_with_the_reason():
    """FlashInfer's have the bits of an exact cute-dsl build, up to a row of zeros: `explain` says so."""
    reason = (
        "build is 'batch-invariant'; FlashInfer 0.7.4's batch-invariant quantizers are not served"
    )
    with pytest.raises(ValueError, match=reason):
        nvfp4_quantize(X, G, **TOKEN, build="batch-invariant")
    assert reason in str(explain(X, G, **TOKEN, build="batch-invariant"))
    (note,) = explain(X, G, **TOKEN, build="cute-dsl", fast_math=False).notes
    assert "batch-invariant quantizers are not served" in note
    for other in ({"fast_math": True}, {"nvfp4_4over6": FOUR}):
        given = {"build": "cute-dsl", "fast_math": False} | other
        assert explain(X, G, **TOKEN, **given).notes == ()


PROVEN = (
    TOKEN,
    TOKEN | {"nvfp4_4over6": FOUR},
    {"fast_math": False},
    {"sfLayout": 2},
    {"build": "cute-dsl"},
    {"nvfp4_4over6": FOUR},
    {"a_global_sf": torch.ones(128)},
    {"a": X.to(torch.float8_e4m3fn)},
    TOKEN | {"out_scale": torch.ones(1)},
    TOKEN | {"expanded_idx_to_permuted_idx": INDEX},
)


def test_what_the_golden_files_prove_has_no_note():
    for arguments in PROVEN:
        assert explain(**({"a": X, "a_global_sf": G} | arguments)).notes == ()


# What it returns


def oracle(a, scale, recipe, layout, *, per_token, **named):
    quantize = reference.quantize_per_token if per_token else reference.quantize_global_scale
    return quantize(a, scale, recipe, layout, **named)


@pytest.mark.parametrize("layout", SfLayout, ids=lambda x: x.name)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("m", [0, 1, 128, 129])
def test_returns(layout, per_token, m):
    a, scale = inputs.synthetic("edge", m, 112), G if per_token else 30.0
    result = nvfp4_quantize(a, scale, layout, per_token_activation=per_token)
    tile = {"layout_128x4": 128, "layout_8x4": 8, "layout_linear": 1}[layout.name]
    shapes = [(m, 56), (-(-m // tile) * tile, 7 if tile == 1 else 8), (m,)]
    assert [tuple(t.shape) for t in result] == shapes[: 2 + per_token]
    types = [torch.uint8, torch.uint8, torch.float32]
    assert [t.dtype for t in result] == types[: 2 + per_token]
    assert_quantized(result, oracle(a, scale, Recipe(), layout, per_token=per_token), "reference")


@pytest.mark.parametrize("recipe", all_recipes(), ids=str)
def test_the_arguments_say_the_recipe(recipe):
    a = inputs.synthetic("edge", 40, 112)
    result = nvfp4_quantize(
        a,
        recipe.base_scale_inv,
        per_token_activation=True,
        nvfp4_4over6=recipe.four_over_six,
        fast_math=recipe.math == "fast",
        build=recipe.build,
    )
    assert_quantized(
        result,
        oracle(a, recipe.base_scale_inv, recipe, SfLayout.layout_128x4, per_token=True),
        str(recipe),
    )


@pytest.mark.parametrize("variable", [NEW, OLD])
def test_the_environment_says_the_math(monkeypatch, variable):
    a = inputs.synthetic("edge", 40, 112)
    monkeypatch.setenv(variable, "1")
    for build in ("cuda", "cute-dsl"):
        math = "exact" if variable == NEW or build == "cuda" else "fast"
        expected = oracle(a, G, Recipe(math, build=build), SfLayout(0), per_token=True)
        assert_quantized(nvfp4_quantize(a, G, **TOKEN, build=build), expected, build)
        fast = oracle(a, G, Recipe(build=build), SfLayout(0), per_token=True)
        assert_quantized(nvfp4_quantize(a, G, **TOKEN, build=build, fast_math=True), fast, build)


def test_the_environment_says_4over6_where_it_is_omitted(monkeypatch):
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    on = oracle(X, G, Recipe(four_over_six=FOUR), SfLayout(0), per_token=True)
    off = oracle(X, G, Recipe(), SfLayout(0), per_token=True)
    assert_quantized(nvfp4_quantize(X, G, **TOKEN), on, "omitted")
    assert_quantized(nvfp4_quantize(X, G, **TOKEN, nvfp4_4over6=None), off, "None")
    assert not torch.equal(on.codes, off.codes)
    e4m3 = X.to(torch.float8_e4m3fn)  # has no 4over6, which FlashInfer ignores there
    plain = oracle(e4m3, 9.0, Recipe(), SfLayout(0), per_token=False)
    assert_quantized(nvfp4_quantize(e4m3, 9.0), plain, "e4m3")


@pytest.mark.parametrize("case", ["per token", "global", "rows", "index"])
def test_do_shuffle(case):
    named, scale = {}, G
    if case in ("global", "rows"):
        scale = 30.0 if case == "global" else torch.linspace(1, 90, 128)
    if case == "index":
        named = {"row_index": INDEX.flip(0)[:128]}
    per_token = case in ("per token", "index")
    result = nvfp4_quantize(
        X,
        scale,
        do_shuffle=True,
        per_token_activation=per_token,
        expanded_idx_to_permuted_idx=named.get("row_index"),
    )
    plain = oracle(X, scale, Recipe(), SfLayout.layout_linear, per_token=per_token, **named)
    order = shuffle_rows(128)
    assert order.tolist() != list(range(128))
    assert_bitwise(result[0], plain.codes[order], "codes")
    scales = layouts.to_linear(result[1], 128, 12, SfLayout.layout_128x4)
    assert_bitwise(scales, plain.block_scales[order], "block scales")
    assert result[1].shape == (128, 12)
    if per_token:
        assert_bitwise(result[2], plain.per_token_scale[order], "per-token scales")


def test_the_row_order_is_flashinfers():
    utils = pytest.importorskip("flashinfer.utils", reason="needs flashinfer-python")
    theirs = utils.get_shuffle_matrix_a_row_indices(torch.empty(256, 8), 128)
    assert shuffle_rows(256).tolist() == theirs.tolist()


def test_every_other_argument_reaches_the_quantizer():
    index, out = INDEX.flip(0).clone(), torch.full((1,), 0.3)
    index[5] = -1
    result = nvfp4_quantize(X, G, **TOKEN, expanded_idx_to_permuted_idx=index, out_scale=out)
    expected = oracle(X, G, Recipe(), SfLayout(0), per_token=True, row_index=index, out_scale=out)
    assert_quantized(result, expected, "index and out_scale")
    assert not result[0][122].any() and result[2][122] == 0  # the row that no entry names


def test_fp32_and_non_contiguous_input():
    x = X.float()
    expected = oracle(x, G, Recipe(), SfLayout(0), per_token=True)
    assert_quantized(nvfp4_quantize(x, G, **TOKEN), expected, "fp32")
    t = inputs.synthetic("normal", 192, 128).t()
    expected = oracle(t.contiguous(), G, Recipe(), SfLayout(0), per_token=True)
    assert_quantized(nvfp4_quantize(t, G, **TOKEN), expected, "transposed")


def test_flashinfers_own_objects(monkeypatch):
    flashinfer = pytest.importorskip("flashinfer", reason="needs flashinfer-python")
    from flashinfer.quantization import nvfp4_quantization_utils as utils

    theirs = utils.NVFP44Over6Config(256, "MSE", True)
    expected = oracle(
        X, 1 / 1536, Recipe(four_over_six=FOUR_256), SfLayout.layout_8x4, per_token=True
    )
    result = nvfp4_quantize(
        X, 1 / 1536, flashinfer.SfLayout.layout_8x4, **TOKEN, nvfp4_4over6=theirs
    )
    assert_quantized(result, expected, "config and layout")
    # Omitted: any base scale does.
    expected = oracle(X, 1.0, Recipe(), SfLayout(0), per_token=True)
    result = nvfp4_quantize(X, 1.0, **TOKEN, nvfp4_4over6=utils._UNSET)
    assert_quantized(result, expected, "sentinel")
    asked = []
    monkeypatch.setattr(quantize_api.QUANTIZE, "run", lambda backend, r: asked.append(r.recipe))
    nvfp4_quantize(X, 1 / 1536, **TOKEN, nvfp4_4over6=theirs)
    assert asked == [Recipe(four_over_six=FOUR_256)]  # ours from here on, to hash and compare alike


def test_the_sentinel_reads_as_what_it_means():
    assert repr(UNSET) == "<omitted: FLASHINFER_NVFP4_4OVER6*>"


# Around it


def test_torch_compile_traces_the_whole_call(flashinfer_here, monkeypatch):
    def call(a, scale):
        token = nvfp4_quantize(
            a, 1 / 1536, SfLayout.layout_8x4, **TOKEN, nvfp4_4over6=FOUR_256, fast_math=False
        )
        return *token, *nvfp4_quantize(a, scale, do_shuffle=True, backend="reference")

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    scale = torch.full((1,), 40.0)
    for got, want in zip(compiled(X, scale), call(X, scale), strict=True):
        assert_bitwise(got, want, "compiled")


def test_while_compiling_auto_passes_over_flashinfer(flashinfer_here, monkeypatch, caplog):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    backends.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "nvfp4_moe"):
        explanation = explain(meta(), G, **TOKEN, capability=(10, 0))
    assert explanation.backend == "triton" and not caplog.records
    # A tensor that cannot be read while tracing is not checked.
    assert explain(X, torch.ones(1), **TOKEN, nvfp4_4over6=None).backend == "reference"


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_works_without_flashinfer_and_triton():
    run_python(
        "import sys\n"
        "sys.modules['flashinfer'] = sys.modules['triton'] = None\n"
        "import torch, nvfp4_moe as n\n"
        "a = torch.ones(4, 16, dtype=torch.bfloat16)\n"
        "n.nvfp4_quantize(a, 1 / 2688, per_token_activation=True)\n"
        "e = n.explain(a, 1 / 2688, per_token_activation=True, capability=(10, 0))\n"
        "assert e.backend == 'reference', e\n"
        "assert 'not installed' in e.reason('flashinfer:cuda') + e.reason('triton'), e\n"
    )


def test_import_and_explain_do_not_import_flashinfer():
    run_python(
        "import sys, torch, nvfp4_moe as n\n"
        "a = torch.ones(4, 16, dtype=torch.bfloat16)\n"
        "n.nvfp4_quantize(a, 1 / 2688, per_token_activation=True)\n"
        "for c in ((9, 0), (10, 0)): str(n.explain(a, 1.0, capability=c))\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'flashinfer' and sys.modules[m]]\n"
    )


def test_exports():
    names = {"nvfp4_quantize", "explain", "SfLayout", "NVFP44Over6Config", "NVFP44Over6ErrMode"}
    names |= {"Recipe", "UnsupportedError", "__version__"}
    assert names <= set(nvfp4_moe.__all__) and all(hasattr(nvfp4_moe, n) for n in nvfp4_moe.__all__)
    assert issubclass(UnsupportedError, ValueError)


@pytest.mark.parametrize("capability", ["10", 100, (10,), (-1, 0), (10.0, 0), (10, 0, 0)])
def test_a_capability_is_two_numbers(capability):
    with pytest.raises((TypeError, ValueError), match=r"^capability is .*; it must be None, or a"):
        check_capability(capability)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("m", [1, 32, 33, 128, 129, 4096])
def test_every_length_of_rows_has_a_configuration(m, four_over_six, tiled):
    """Programs have warps, and the one read, or all splits together, reach the end of a row."""
    for num_blocks in range(1, 1300):
        config = launch_config(m, num_blocks, four_over_six=four_over_six, tiled=tiled)
        assert config.warps in (1, 2, 4, 8, 16), (num_blocks, config)
        reached = config.blocks * (config.splits if config.read else config.parts)
        assert reached >= num_blocks or (config.read and config.splits == 1), (num_blocks, config)
