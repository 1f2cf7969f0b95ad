"""One dense product: what it rejects, which backend it takes and why. No GPU needed."""

# SPDX-License-Identifier: Apache-2.0
import inspect
import re
from dataclasses import replace

import dense_cases
import pytest
import torch
from assertions import assert_bitwise
from installations import pretend

import nvfp4_moe
from nvfp4_moe import UnsupportedError, explain_mm_fp4, mm_fp4, nvfp4_quantize
from nvfp4_moe.kernels import triton_target
from nvfp4_moe.kernels.dense import api as dense_api
from nvfp4_moe.kernels.dense.call import make_dense_call
from nvfp4_moe.kernels.flashinfer import dense as flashinfer_dense
from nvfp4_moe.reference import dense

CASE = dense_cases.coarse(33, 64, 256)
GOOD = CASE.arguments


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(triton_target, "INTERPRETING", False)


@pytest.fixture
def flashinfer_here(monkeypatch):
    """As on a machine where every FlashInfer backend is installed completely."""
    pretend(monkeypatch)


INVALID = {
    "mxfp4": ({"use_nvfp4": False}, ValueError, "use_nvfp4 is False; .*must be True"),
    "block 32": ({"block_size": 32}, ValueError, "block_size is 32; it must be 16"),
    "a list": ({"a": [1]}, TypeError, "a is a list of 1; it must be a tensor"),
    "b none": ({"b": None}, TypeError, "b is None; it must be a tensor of uint8"),
    "a values": ({"a": CASE.a.float()}, ValueError, "a is float32 .*of uint8 or float4"),
    "b values": ({"b": CASE.b_rows.T.bfloat16()}, ValueError, "b is bfloat16 .*of uint8"),
    "a 3-D": ({"a": CASE.a[None]}, ValueError, r"a is uint8 \[1, 33, 128\]; .*\[M, K/2\]"),
    "b 1-D": ({"b": CASE.b_rows[0]}, ValueError, r"b is uint8 \[128\]; .*\[K/2, N\]"),
    "K 24": (
        {"a": CASE.a[:, :12], "b": CASE.b_rows[:, :12].T},
        ValueError,
        "a has K = 24 .*; K must be a positive multiple of 16",
    ),
    "K 0": ({"a": CASE.a[:, :0]}, ValueError, "a has K = 0"),
    "K of b": ({"b": CASE.b_rows[:, :64].T}, ValueError, "b has 64 rows; .*K/2 = 128"),
    "b upright": (
        {"b": CASE.b_rows.T.contiguous()},
        ValueError,
        r"b has strides \(64, 1\); .*column-",
    ),
    "b elsewhere": ({"b": CASE.b_rows.to("meta").T}, ValueError, "b is on meta; it must be on a's"),
    "scales none": ({"a_descale": None}, TypeError, "a_descale is None; it must be a tensor"),
    "scales fp32": ({"b_descale": CASE.b_scales.float().T}, ValueError, "b_descale is float32"),
    "scales unpadded": (
        {"a_descale": CASE.a_scales[:33]},
        ValueError,
        r"a_descale has shape \(33, 16\) .*33 rows of 16 blocks in layout_128x4 .*\[128, 16\]",
    ),
    "scales 128x4 for 8x4": ({"use_8x4_sf_layout": True}, ValueError, r"layout_8x4 .*\[40, 16\]"),
    "b_descale upright": (
        {"b_descale": CASE.b_scales},
        ValueError,
        r"b_descale has shape \(128, 16\) and strides \(16, 1\); .*\[16, 128\], a transpose",
    ),
    "scales elsewhere": (
        {"a_descale": CASE.a_scales.to("meta")},
        ValueError,
        "a_descale is on meta; it must be on a's device, cpu",
    ),
    "alpha float": ({"alpha": 1.0}, TypeError, "alpha is 1.0; it must be a tensor"),
    "alpha fp64": ({"alpha": torch.ones(1).double()}, ValueError, "alpha is float64"),
    "alpha N": (
        {"alpha": torch.ones(64)},
        ValueError,
        r"alpha is float32 \[64\]; .*one element, or of one a row \(33\)",
    ),
    "alpha elsewhere": ({"alpha": torch.ones(1, device="meta")}, ValueError, "alpha is on meta"),
    "out_dtype": ({"out_dtype": torch.float32}, ValueError, "float32; it must be torch.b"),
    "out list": ({"out": []}, TypeError, "out is a list of 0; it must be a tensor"),
    "out dtype": (
        {"out": torch.zeros(33, 64, dtype=torch.float16)},
        ValueError,
        "out is float16 .*a tensor of bfloat16",
    ),
    "out shape": (
        {"out": torch.zeros(64, 33).bfloat16()},
        ValueError,
        r"out is bfloat16 \[64, 33\]; .*\[33, 64\]",
    ),
    "out strides": ({"out": torch.zeros(64, 33).bfloat16().T}, ValueError, r"strides \(1, 33\)"),
    "out elsewhere": (
        {"out": torch.zeros(33, 64, device="meta").bfloat16()},
        ValueError,
        "out is on meta",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_is_one_error_on_every_backend(name):
    change, error, message = INVALID[name]
    texts = set()
    for backend in ("auto", *dense_api.BACKENDS, "cutlass", "cake"):
        with pytest.raises(error, match=message) as raised:
            mm_fp4(**GOOD | change, backend=backend)
        assert not isinstance(raised.value, UnsupportedError)
        texts.add(str(raised.value))
    assert len(texts) == 1
    explanation = explain_mm_fp4(**GOOD | change)
    assert explanation.backend is None
    assert explanation.reasons == tuple((b, texts.copy().pop()) for b in dense_api.BACKENDS)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cublas'; it must be one of auto, flashinfer"):
        mm_fp4(**GOOD, backend="cublas")


# What is accepted


@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
@pytest.mark.parametrize("use_8x4", [False, True])
def test_a_cpu_tensor_goes_to_the_reference(alpha, use_8x4):
    case = dense_cases.coarse(9, 24, 48, alpha=alpha, use_8x4=use_8x4)
    want = dense.mm_fp4(**case.arguments)
    assert_bitwise(mm_fp4(**case.arguments), want, "auto")
    out = torch.full((9, 24), torch.nan, dtype=torch.bfloat16)
    assert mm_fp4(**case.arguments, out=out, backend="reference") is out
    assert_bitwise(out, want, "out")


def test_every_dtype_of_the_same_bytes():
    want = mm_fp4(**GOOD)
    fp4, e4m3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    other = {
        "a": CASE.a.view(fp4),
        "b": CASE.b_rows.view(fp4).T,
        "a_descale": CASE.a_scales.view(e4m3),
        "b_descale": CASE.b_scales.view(e4m3).T,
    }
    assert_bitwise(mm_fp4(**GOOD | other), want, "native dtypes")
    flat = {"a_descale": CASE.a_scales.flatten(), "b_descale": CASE.b_scales.flatten()}
    assert_bitwise(mm_fp4(**GOOD | flat), want, "flat scales")


def test_no_rows_and_no_columns():
    case = dense_cases.coarse(0, 64, 32, alpha="scalar")
    assert mm_fp4(**case.arguments).shape == (0, 64)
    case = dense_cases.coarse(3, 0, 32)
    assert mm_fp4(**case.arguments).shape == (3, 0)


def test_padding_is_not_read():
    case = dense_cases.coarse(33, 40, 80)
    poisoned = dense_cases.with_poisoned_padding(case)
    assert_bitwise(mm_fp4(**poisoned.arguments), mm_fp4(**case.arguments), "padding of NaN")


def test_what_the_quantizer_returns_fits():
    """Per token, in both layouts, with the token scales as alpha."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 96, generator=g).bfloat16(), torch.randn(48, 96, generator=g).bfloat16()
    q_w, s_w = nvfp4_quantize(w, 2688 / float(w.abs().max()))
    for use_8x4 in (False, True):
        q, s, token = nvfp4_quantize(x, 1 / 2688, int(use_8x4), per_token_activation=True)
        alpha = token * float(w.abs().max()) / 2688
        got = mm_fp4(q, q_w.T, s, s_w.T, alpha, use_8x4_sf_layout=use_8x4).double()
        want = x.double() @ w.double().T
        assert (got - want).norm() < 0.15 * want.norm()


# Reasons and choices


def meta(m=128, n=256, k=512, *, alpha="none", **changes):
    """The arguments of a call on no device."""
    case = dense_cases.coarse(1, 1, 16)
    blocks = k // 16
    rows, columns, padded = -(-m // 128) * 128, -(-n // 128) * 128, -(-blocks // 4) * 4

    def empty(*shape, dtype=torch.uint8):
        return torch.empty(shape, dtype=dtype, device="meta")

    size = {"none": 0, "scalar": 1, "rows": m}[alpha]
    arguments = replace(
        case,
        a=empty(m, k // 2),
        b_rows=empty(n, k // 2),
        a_scales=empty(rows, padded),
        b_scales=empty(columns, padded),
        alpha=empty(size, dtype=torch.float32) if size else None,
    ).arguments
    if changes.get("use_8x4_sf_layout"):
        arguments["a_descale"] = empty(-(-m // 8) * 8, padded)
    return arguments | changes


FI = tuple(flashinfer_dense.RULES)
REASONS = {
    "an H100": (meta(), (9, 0), FI[:-1], "sm_90 has no kernels; sm_1"),
    "no GPU": (meta(), None, (*FI, "triton"), "a is on the meta"),
    "shuffled b": (meta(), (10, 0), ["flashinfer:trtllm"], "takes b with shuffled rows"),
    "one alpha a row": (
        meta(alpha="rows"), (10, 0),
        [b for b in FI if b not in ("flashinfer:cute-dsl", "flashinfer:cake", "flashinfer:trtllm",
                                    "flashinfer:b12x")],
        "alpha has one element a row; it takes one in all",
    ),
    "one alpha a row on sm_120": (
        meta(alpha="rows"), (12, 0), ["flashinfer:cute-dsl"], "row; on sm_120 it takes one in all",
    ),
    "one alpha with cake": (
        meta(alpha="scalar"), (10, 3), ["flashinfer:cake"], "alpha with one element a row only",
    ),
    "8x4": (
        meta(use_8x4_sf_layout=True), (10, 0), ["flashinfer:cutlass", "flashinfer:cute-dsl"], "8x4",
    ),
    "N 40": (meta(n=40), (10, 0), ["flashinfer:cutlass"], "N is 40; it must be a multiple of 32"),
    "N 36": (meta(n=36), (10, 0), ["flashinfer:cute-dsl"], "N is 36; it must be a multiple of 8"),
    "K 48": (
        meta(k=48), (10, 0), ["flashinfer:cutlass", "flashinfer:cute-dsl", "flashinfer:cudnn"],
        "K is 48; it must be a multiple of 32",
    ),
    "K 384 with cake": (
        meta(k=384, alpha="rows"), (10, 0), ["flashinfer:cake"], "K is 384; .*multiple of 256",
    ),
    "many rows": (
        meta(), (10, 0), ["flashinfer:cutedsl_low_latency"], "M is 128 and K 512; it takes M up to 8",
    ),
    "fp16 on sm_121": (
        meta(out_dtype=torch.float16), (12, 1), ["flashinfer:cute-dsl"], "writes bfloat16 only",
    ),
    "N 96 on sm_120": (meta(n=96), (12, 0), ["flashinfer:cute-dsl"], "N is 96 .*multiples of 64"),
    "2^31 on sm_120": (
        meta(m=1 << 17, n=1 << 14), (12, 0), ["flashinfer:cute-dsl"], "offsets are 31 bits",
    ),
    "no PDL with cake": (
        meta(alpha="rows", enable_pdl=False), (10, 0), ["flashinfer:cake"], "enable_pdl=False",
    ),
    "a T4": (meta(), (7, 5), ["triton"], "sm_75 is before sm_80"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_reasons(flashinfer_here, name):
    arguments, capability, backends, reason = REASONS[name]
    explanation = explain_mm_fp4(**arguments, capability=capability)
    assert backends
    for backend in backends:
        text = explanation.reason(backend)
        assert text is not None, f"{backend} can serve"
        assert re.search(reason, text), text


@pytest.mark.parametrize(
    ("capability", "arguments", "chosen"),
    [
        ((10, 0), meta(alpha="scalar"), "flashinfer:cutlass"),
        ((10, 0), meta(), "flashinfer:cutlass"),
        ((10, 0), meta(alpha="rows"), "flashinfer:cute-dsl"),
        ((10, 3), meta(alpha="rows"), "flashinfer:cute-dsl"),
        ((10, 3), meta(m=1, alpha="rows"), "flashinfer:cutlass"),
        ((10, 7), meta(alpha="rows"), "triton"),
        ((10, 0), meta(n=40), "flashinfer:cute-dsl"),
        ((10, 0), meta(n=36), "triton"),
        ((10, 0), meta(use_8x4_sf_layout=True), "triton"),
        ((12, 0), meta(alpha="rows"), "triton"),
        ((12, 1), meta(alpha="scalar"), "flashinfer:cutlass"),
        ((9, 0), meta(alpha="rows"), "triton"),
        ((8, 0), meta(), "triton"),
        ((7, 5), meta(), "reference"),
        (None, meta(), "reference"),
    ],
)
def test_auto(flashinfer_here, capability, arguments, chosen):
    explanation = explain_mm_fp4(**arguments, capability=capability)
    assert explanation.backend == chosen and explanation.reason(chosen) is None


def test_every_backend_but_trtllm_can_serve_something(flashinfer_here):
    served = set()
    for capability in ((10, 0), (12, 0)):
        for arguments in (meta(m=8, alpha="scalar"), meta(alpha="rows")):
            reasons = explain_mm_fp4(**arguments, capability=capability).reasons
            served |= {name for name, reason in reasons if reason is None}
    assert served == set(dense_api.BACKENDS) - {"flashinfer:trtllm"}


def test_an_older_flashinfer_has_no_alpha_for_each_row(flashinfer_here, monkeypatch):
    pretend(monkeypatch, version=(0, 7, 1))
    explanation = explain_mm_fp4(**meta(alpha="rows"), capability=(10, 0))
    assert explanation.backend == "triton"
    for backend in ("flashinfer:cute-dsl", "flashinfer:cake"):
        assert "0.7.2" in (explanation.reason(backend) or "")


@pytest.mark.parametrize("backend", ["triton", *FI])
def test_a_named_backend_never_falls_back(flashinfer_here, monkeypatch, backend):
    monkeypatch.setattr(dense_api.MM_FP4, "run", lambda *args: pytest.fail("something ran"))
    with pytest.raises(UnsupportedError, match=f"backend {backend} cannot .*: a is on the cpu"):
        mm_fp4(**GOOD, backend=backend)
    assert explain_mm_fp4(**GOOD, backend=backend).backend is None


# FlashInfer's side


def test_the_signature_is_flashinfers(flashinfer):
    ours, theirs = (
        {n: p.default for n, p in inspect.signature(f).parameters.items() if n != "batch_invariant"}
        for f in (mm_fp4, flashinfer.mm_fp4)
    )
    assert ours == theirs and list(ours) == list(theirs)


def request_of(alpha="rows", **changes):
    c = dense_cases.coarse(33, 64, 256, alpha=alpha).arguments
    return make_dense_call(
        **c, out=None, block_size=16, use_nvfp4=True, enable_pdl=changes.pop("enable_pdl", True)
    )


@pytest.mark.parametrize("backend", [b for b in FI if b != "flashinfer:trtllm"])
def test_flashinfer_takes_what_the_adapter_builds(flashinfer, backend):
    """Its own checks of arguments, those that ask nothing of a GPU, pass."""
    from flashinfer.gemm import gemm_base

    per_row = backend in ("flashinfer:cute-dsl", "flashinfer:cake")
    r = request_of("rows" if per_row else "none")
    out = r.output()
    arguments = flashinfer_dense.arguments(backend, r, out)
    parameters = set(inspect.signature(flashinfer.mm_fp4).parameters)
    assert set(arguments) == parameters - {"batch_invariant"}
    assert gemm_base._check_mm_fp4_problem_size(**arguments)
    assert arguments["backend"] == backend.removeprefix("flashinfer:")
    assert arguments["b"].shape == (128, 64) and arguments["b"].stride() == (1, 128)
    assert arguments["b_descale"].T.is_contiguous() and arguments["out"] is out
    if backend == "flashinfer:cutlass":
        assert gemm_base._cutlass_gemm_fp4_requirement(**arguments)
        assert arguments["alpha"].tolist() == [1.0]
    elif backend == "flashinfer:cake":
        assert gemm_base.cake_mm_fp4_requirement(**arguments)
    elif backend == "flashinfer:cutedsl_low_latency":
        with pytest.raises(ValueError, match="M <= 8"):
            gemm_base._cutedsl_low_latency_gemm_fp4_requirement(**arguments)


@pytest.mark.parametrize(
    ("rule", "function"),
    [
        ("flashinfer:cutlass", "_cutlass_gemm_fp4_requirement"),
        ("flashinfer:cute-dsl", "_cute_dsl_gemm_fp4_requirement"),
        ("flashinfer:cudnn", "_cudnn_gemm_fp4_requirement"),
        ("flashinfer:cutedsl_low_latency", "_cutedsl_low_latency_gemm_fp4_requirement"),
        ("flashinfer:b12x", "_b12x_gemm_fp4_requirement"),
        ("flashinfer:cake", "cake_mm_fp4_requirement"),
    ],
)
def test_the_capabilities_are_flashinfers(flashinfer, flashinfer_here, rule, function):
    from flashinfer.gemm import gemm_base

    theirs = getattr(gemm_base, function)._supported_ccs
    alpha = "rows" if rule == "flashinfer:cake" else "scalar"
    for capability in ((8, 0), (9, 0), (10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1)):
        ours = explain_mm_fp4(**meta(m=8, alpha=alpha), capability=capability).reason(rule)
        assert (ours is None) == (capability[0] * 10 + capability[1] in theirs), capability


def test_the_package_exports_it():
    assert {"mm_fp4", "explain_mm_fp4"} <= set(nvfp4_moe.__all__)
