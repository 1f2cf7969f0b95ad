"""bf16 rows times NVFP4 weights: the reference by exact fractions, Triton by the reference."""

# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import dense_cases
import pretend_gpu
import pytest
import torch
from assertions import assert_bitwise, assert_inside

from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.kernels.dense import hopper
from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.api import MM_FP4, mm_bf16_fp4, mm_fp4
from nvfp4_moe.kernels.dense.call import KernelCall, make_bf16_call, make_dense_call
from nvfp4_moe.kernels.dense.launch import dense_config
from nvfp4_moe.kernels.moe.hopper import launch as hopper_launch
from nvfp4_moe.kernels.moe.hopper import rows as hopper_rows
from nvfp4_moe.kernels.op_schema import OPS
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference import dense as reference
from nvfp4_moe.reference.bounds.accumulation import CONTIGUOUS
from nvfp4_moe.reference.bounds.dense import mm_bf16_fp4_bounds

SMALL = {
    "narrow": GemmConfig(64, 16, 128, 1, 4),
    "decoded": GemmConfig(64, 32, 64, 1, 4, decoded=True),
}
PLACES = [
    *(pytest.param("cpu", c, marks=pytest.mark.interpreter, id=name) for name, c in SMALL.items()),
    pytest.param("cuda", None, marks=pytest.mark.gpu, id="cuda"),
]
SHAPES = ((1, 1, 16), (33, 130, 208), (130, 33, 272), (9, 96, 32), (17, 64, 192))
LARGE = tuple((m, 520, 1088) for m in (1, 9, 17, 33, 200, 1000))
"""Shapes that a GPU alone multiplies in reasonable time: every tile of the GEMM for sm_90."""


def whole(m: int, k: int) -> torch.Tensor:
    """[m, k] bf16 of whole numbers up to 8: with coarse weights the sums are exact."""
    g = torch.Generator().manual_seed(m + k)
    return torch.randint(-8, 9, (m, k), generator=g).bfloat16()


def in_triton(x, case, device, config=None, *, batch_invariant=False) -> torch.Tensor:
    c = case.to(device)
    out = torch.full((len(x), len(c.b_rows)), torch.nan, dtype=torch.bfloat16, device=device)
    call = KernelCall(
        x.to(device), c.b_rows, None, c.b_scales, c.alpha, batch_invariant=batch_invariant
    )
    dense_launch.mm_fp4(call, out, config)
    return out


def in_reference(x, case) -> torch.Tensor:
    return reference.mm_bf16_fp4(x, case.b_rows.T, case.b_scales.T, case.alpha)


def test_reference_by_exact_fractions():
    case, x = dense_cases.real(3, 4, 48), torch.randn(3, 48).bfloat16()
    case = dense_cases.replace(case, alpha=torch.tensor([0.37]))
    w = reference.values(case.b_rows, case.b_scales, dense_cases.SfLayout.layout_128x4)
    for m in range(3):
        for n in range(4):
            pairs = zip(x[m].tolist(), w[n].tolist(), strict=True)
            total = float(sum(Fraction(a) * Fraction(b) for a, b in pairs))
            want = (torch.tensor(total, dtype=torch.float32) * case.alpha[0]).bfloat16()
            assert in_reference(x, case)[m, n] == want


@pytest.mark.parametrize(("device", "config"), PLACES)
def test_bits_of_exact_sums(device, config):
    for m, n, k in SHAPES + (LARGE if device == "cuda" else ()):
        for alpha in ("none", "scalar", "rows"):
            case = dense_cases.with_poisoned_padding(dense_cases.coarse(m, n, k, alpha=alpha))
            x = whole(m, k)
            got = in_triton(x, case, device, config)
            assert_bitwise(got, in_reference(x, case), f"{m} x {n} x {k}, {alpha}")


@pytest.mark.parametrize(("device", "config"), PLACES)
def test_other_sums_are_inside_the_interval(device, config):
    for m, n, k in ((1, 70, 272), (33, 96, 512), *(LARGE if device == "cuda" else ())):
        case = dense_cases.real(m, n, k)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
        given = x, case.b_rows.T, case.b_scales.T, case.alpha
        bounds = mm_bf16_fp4_bounds(*given, accumulation=CONTIGUOUS)
        got = in_triton(x, case, device, config).cpu()
        assert_inside(got, bounds, f"{m} x {n} x {k}")
        assert not bounds.contains(got.roll(1, 1)).all(), "another product is outside"


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(("n", "k"), [(18432, 4096), (4096, 2048), (512, 512)])
def test_batch_invariant_tiles_add_in_one_order(arch, n, k):
    """`bk` and `decoded` decide the order of a sum. Without the option, decoded codes have several."""

    def orders(native: bool, batch_invariant: bool) -> int:
        options = {"native": native, "batch_invariant": batch_invariant}
        made = [dense_config(m, n, k, arch, **options) for m in (1, 17, 40, 200, 4096)]
        return len({(config.bk, config.decoded) for config in made})

    assert orders(False, True) == orders(True, True) == 1
    assert orders(False, False) > 1


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "invariant"), [(4096, True), (4112, True), (4112, False)])
def test_a_row_depends_on_no_other_row(k, invariant):
    """With the option no row differs; without it some do, so that the test can fail.

    The GEMM for sm_90 has 4096 columns, and the same bits without the option; it does not have 4112.
    """
    case = dense_cases.real(2050, 2048, k)
    x = torch.randn(2050, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    c, x = case.to("cuda"), x.cuda()
    b = c.b_rows.T, c.b_scales.T

    def of_bf16(rows: int) -> torch.Tensor:
        return mm_bf16_fp4(x[:rows], *b, c.alpha[:rows], batch_invariant=invariant)

    def of_codes(rows: int) -> torch.Tensor:
        scales = c.a_scales[: -(-rows // 128) * 128]
        options = {"alpha": c.alpha[:rows], "batch_invariant": invariant}
        return mm_fp4(c.a[:rows], b[0], scales, b[1], **options)

    for product in (of_bf16, of_codes):
        every = product(2050)
        differ = [int((product(m) != every[:m]).sum()) for m in (1, 16, 33, 200)]
        assert (sum(differ) == 0) == invariant, f"{product.__name__}: {differ} elements differ"


def test_the_table():
    case, x = dense_cases.coarse(3, 8, 32, alpha="none"), whole(3, 32)
    b = case.b_rows.T, case.b_scales.T
    assert_bitwise(mm_bf16_fp4(x, *b), in_reference(x, case), "auto")
    call = make_bf16_call(x, *b)
    for name in MM_FP4.names:
        if name.startswith("flashinfer:"):
            with pytest.raises(UnsupportedError):
                mm_bf16_fp4(x, *b, backend=name)
            assert MM_FP4.refusal(name, call) is not None


@pytest.mark.skipif(
    hopper.refusal(90, 64) is not None, reason=f"the GEMM for sm_90: {hopper.refusal(90, 64)}"
)
@pytest.mark.parametrize("k", [192, 80])
def test_the_launches_on_sm_90(monkeypatch, k):
    """Rows of bf16 are reordered for the GEMM for sm_90 where it serves, and for the other elsewhere."""
    pretend_gpu.present(monkeypatch)
    made = []
    for module in (dense_launch, hopper_launch, hopper_rows):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, x, *_, **__: made.append((str(kernel), x.shape))
        )
    case = dense_cases.coarse(33, 40, k, alpha="none")
    mm_bf16_fp4(whole(33, k), case.b_rows.T, case.b_scales.T, backend="triton")
    if k == 192:
        assert len(made) == 2 and "rows_kernel" in made[0][0]
        assert "dense_gemm" in made[1][0]
    else:
        assert [shape for _, shape in made] == [(33, 4, 20)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a": torch.zeros(3, 32)}, r"a is float32 \[3, 32\]; it must be a tensor of bfloat16"),
        ({"a": torch.zeros(3, 24).bfloat16()}, "a has K = 24; K must be a positive multiple of 16"),
        ({"a": torch.zeros(3, 48).bfloat16()}, "b has 16 rows; it must have a's columns, K/2 = 24"),
        ({"b_descale": torch.zeros(3, dtype=torch.uint8)}, "b_descale has shape"),
        ({"alpha": torch.ones(2)}, "alpha is"),
        ({"batch_invariant": 1}, "batch_invariant is 1"),
        ({"backend": "cublas"}, "backend is 'cublas'"),
    ],
)
def test_bad_arguments(change, text):
    case, x = dense_cases.coarse(3, 8, 32, alpha="none"), whole(3, 32)
    given = {"a": x, "b": case.b_rows.T, "b_descale": case.b_scales.T} | change
    with pytest.raises((ValueError, TypeError), match=text):
        mm_bf16_fp4(**given)


@pytest.mark.parametrize("name", ["a", "alpha"])
def test_a_gradient_is_refused(name):
    """The result would have none, and a model would train without it."""
    case, x = dense_cases.coarse(3, 8, 32, alpha="none"), whole(3, 32)
    given = {"a": x, "b": case.b_rows.T, "b_descale": case.b_scales.T, "alpha": torch.ones(1)}
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} requires a gradient"):
        mm_bf16_fp4(**given)
    with torch.no_grad():
        mm_bf16_fp4(**given)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    c, x = dense_cases.coarse(7, 40, 64), whole(7, 64)
    out = torch.zeros(7, 40, dtype=torch.bfloat16)
    given = (x, c.b_rows, None, c.b_scales, c.alpha, False, False, out)
    torch.library.opcheck(OPS[f"{name}_mm_fp4"], given)


def test_a_compiler_traces_it():
    case, x = dense_cases.coarse(3, 8, 32), whole(3, 32)
    b = case.b_rows.T, case.b_scales.T
    compiled = torch.compile(mm_bf16_fp4, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x, *b, case.alpha), in_reference(x, case), "compiled")


def test_flashinfer_is_not_asked_for_batch_invariance():
    case = dense_cases.coarse(3, 32, 32, alpha="none")
    call = make_dense_call(**case.arguments, batch_invariant=True)
    assert call.batch_invariant
    for name in MM_FP4.names:
        assert (MM_FP4.refusal(name, call) is not None) == (name != "reference")
