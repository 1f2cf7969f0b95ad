"""Statistics of quantization: known counts, a slow loop, sums that add up, and the fused call's."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import math
import re
from dataclasses import replace

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from installations import pretend
from moe_cases import Shape
from paths import ROOT
from statistics_cases import FOUR, assert_same, assert_slow, slow

import nvfp4_moe
from nvfp4_moe import LayerStatistics, MoEStatistics
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.hidden_states import Activations, quantize_activations
from nvfp4_moe.reference.quantize import dequantize
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, all_recipes
from nvfp4_moe.reference.statistics import measure
from nvfp4_moe.reference.statistics.counts import COUNTS, QuantizationStatistics
from nvfp4_moe.reference.statistics.measure import quantization_statistics, weight_statistics
from nvfp4_moe.reference.weights.prepare import quantize_weight

SHAPE = Shape(7, 128, 64, 6, 3)


def counts(s: QuantizationStatistics, expert: int = 0) -> dict[str, int]:
    """Those that are not 0."""
    found = dict(zip(COUNTS, s.counts[expert].tolist(), strict=True))
    return {name: n for name, n in found.items() if n}


def blocks(*given: list[float]) -> torch.Tensor:
    """One row, each block's first elements as given and the rest the last of them."""
    return torch.tensor([[*b, *b[-1:] * (16 - len(b))] for b in given]).reshape(1, -1).bfloat16()


class TestKnownCounts:
    """Row maximum 2688: the encode scale is 1, and a block's scale is its maximum over 6."""

    def test_underflow_zero_and_four(self):
        x = blocks([2688.0, 0.0], [2.0**-9], [0.0], [6.0, 4.5])
        # 2^-9 / 6 is below 2^-10; 4.5 is a code's value times 1.5, and half way between 4 and 5 else.
        want = {"rows": 1, "blocks": 4, "zero blocks": 1, "underflowed": 1}
        s = quantization_statistics(x)
        assert counts(s) == want
        noise = 16 * 2.0**-18 + 15 * 0.25  # 4.5 decodes to 4
        signal = 2688.0**2 + 16 * 2.0**-18 + 36 + 15 * 4.5**2
        assert s.energies.tolist() == [[signal, noise]]
        assert s.snr().item() == pytest.approx(10 * math.log10(signal / noise), rel=1e-12)
        assert s.largest() == s.least() == 2688
        s = quantization_statistics(x, FOUR)
        assert counts(s) == want | {"fours": 1}
        assert s.energies.tolist() == [[signal, 16 * 2.0**-18]]

    def test_a_saturating_candidate_of_four(self):
        """Scales 400 and 600, stored as 384 and 448: most elements are multiples of 448."""
        x = blocks([2688.0], [2400.0, 1792.0])
        s = quantization_statistics(x, FOUR)
        assert counts(s) == {"rows": 1, "blocks": 2, "fours": 1, "saturated": 1}
        narrow = Recipe("fast", NVFP44Over6Config(256))
        assert "saturated" not in counts(quantization_statistics(x, narrow))

    @pytest.mark.parametrize("recipe", [Recipe(), Recipe("exact")], ids=str)
    def test_static_scales_saturate(self, recipe):
        """A scale of 464 rounds to 448, a larger one is cut."""
        one = torch.ones(1)
        for top, want in ((2688.0, 0), (2784.0, 0), (2800.0, 1), (20000.0, 1)):
            s = quantization_statistics(blocks([top], [1.0]), recipe, encode_scale=one)
            assert s.count("saturated").item() == want, top

    def test_what_is_not_finite(self):
        nan, inf = math.nan, math.inf
        rows = [blocks([nan, 1.0], [1.0]), blocks([nan], [1.0]), blocks([inf, nan, 2.0], [3.0])]
        s = quantization_statistics(torch.cat(rows), experts=torch.arange(3), num_experts=3)
        base = {"rows": 1, "blocks": 2, "unmeasured rows": 1}
        assert counts(s, 0) == base | {"nans": 1}
        assert counts(s, 1) == base | {"nans": 16, "nan scales": 1}
        # Fast math: the encode scale is 0.
        assert counts(s, 2) == base | {
            "nans": 1,
            "infinities": 1,
            "nan scales": 1,
            "underflowed": 1,
        }
        assert s.largest().tolist()[:2] == [1, 1] and s.largest()[2].isnan()
        assert not s.energies.any() and s.snr().isnan().all() and s.worst_snr().isnan().all()

    def test_a_row_too_small_for_its_scale(self):
        s = quantization_statistics(torch.full((1, 32), 1e-36).bfloat16(), Recipe("exact"))
        assert counts(s) == {"rows": 1, "blocks": 2, "underflowed": 2}
        assert s.snr() == 0

    def test_row_maxima(self):
        x = torch.zeros(6, 16)
        x[:, 0] = torch.tensor([0.0, -1.0, 2.0, 3.0, 2.0**20, 2.0**-20])
        s = quantization_statistics(x.bfloat16())
        assert s.histogram.sum() == 5 and s.least() == 2.0**-20 and s.largest() == 2.0**20
        assert s.histogram[0, 0] == 1 and s.histogram[0, -1] == 1
        assert s.histogram[0, 64:71].tolist() == [1, 0, 0, 0, 1, 0, 1]
        assert quantization_statistics(x[1:5].bfloat16()).median() == 2.25  # the lower of two
        assert s.median() == 2.25 and s.spread().item() == pytest.approx(20 - math.log2(2.25))
        low = quantization_statistics(x[:2].bfloat16() * 2.0**-30)
        assert low.median() == low.least() == low.largest() == 2.0**-30  # not its bin's middle


@pytest.mark.parametrize("recipe", all_recipes(), ids=str)
def test_slow_loop(recipe):
    """Every recipe, ordinary and extreme rows, several experts a row, some of them not counted."""
    for kind, m in (("edge", 20), ("heavy", 4), ("bits", 4), ("sparse", 4)):
        x = inputs.synthetic(kind, m, 48, seed=3)
        experts = torch.arange(2 * m).remainder(5).sub(1).reshape(m, 2)
        got = quantization_statistics(x, recipe, experts=experts, num_experts=3)
        assert_slow(got, slow(x, recipe, experts, 3), f"{kind} {recipe}")


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("exact"), FOUR], ids=str)
def test_slow_loop_of_static_scales(recipe):
    x = inputs.synthetic("heavy", 6, 48, torch.float16)
    experts = torch.arange(6).remainder(2)
    got = quantization_statistics(
        x, recipe, experts=experts, num_experts=2, encode_scale=torch.full((1,), 30.0)
    )
    assert got.count("saturated").sum() > 0
    assert_slow(got, slow(x, recipe, experts, 2, encode=30.0), str(recipe))


def test_encoded_values():
    """fp32 with the encode scale in it: what is said of bf16 and that scale, in its units."""
    x = inputs.synthetic("heavy", 8, 64)
    scale = torch.full((1,), 8.0)
    got = quantization_statistics(x.float() * 8, encode_scale=scale)
    assert_same(got, quantization_statistics(x, encode_scale=scale), "encoded")


@pytest.mark.parametrize("elements", [1, 64, 150])
def test_parts_of_the_rows(elements, monkeypatch):
    x, experts = inputs.synthetic("edge", 20, 64), torch.arange(40).remainder(3).reshape(20, 2)
    scales = torch.arange(20) + 1.0
    for more in ({}, {"encode_scale": scales}):
        given = {"experts": experts, "num_experts": 3} | more
        want = quantization_statistics(x, FOUR, **given)
        with monkeypatch.context() as patched:
            patched.setattr(measure, "_ELEMENTS", elements)
            assert_same(quantization_statistics(x, FOUR, **given), want, f"{elements}")


def test_sums_add_up():
    """The sums of two calls, ranks or layers are those of all their rows at once."""
    x = torch.cat([inputs.synthetic("edge", 20, 48), inputs.synthetic("heavy", 20, 48)])
    experts = torch.arange(40).remainder(3)
    experts[:9] = 0  # the first part has experts without rows
    given = {"num_experts": 4}
    whole = quantization_statistics(x, FOUR, experts=experts, **given)
    a, b = (
        quantization_statistics(x[some], FOUR, experts=experts[some], **given)
        for some in (slice(0, 9), slice(9, None))
    )
    before = a.clone()
    assert_same(a + b, whole, "a + b")
    assert_same(a, before, "a is left as it is")
    assert a.add_(b) is a
    assert_same(a, whole, "a += b")
    assert_same(whole + QuantizationStatistics.empty(4), whole, "and nothing")
    assert_same(whole.total(), quantization_statistics(x, FOUR), "all experts")
    with pytest.raises(ValueError, match="other has 4 experts; it must have 1"):
        whole.total().add_(whole)


def test_no_rows():
    s = quantization_statistics(torch.empty(0, 32).bfloat16(), num_experts=2)
    assert_same(s, QuantizationStatistics.empty(2), "no rows")
    for figure in (s.snr(), s.worst_snr(), s.least(), s.median(), s.largest(), s.spread()):
        assert figure.isnan().all() and figure.shape == (2,)
    assert s.share("fours").isnan().all()
    assert str(s).splitlines()[1].split() == ["all", "0", *"----------"]


@pytest.mark.parametrize("recipe", [Recipe("exact"), Recipe("exact", NVFP44Over6Config())], ids=str)
def test_weights(recipe):
    """By expert, with the scales that `prepare_experts` gives them."""
    heavy = inputs.synthetic("heavy", 8, 64)
    w = torch.stack([heavy, torch.zeros_like(heavy), heavy * 2.0**9])
    s = weight_statistics(w, recipe)
    codes, scales, decode = quantize_weight(w[0], w[0].abs().amax(), recipe)
    decoded = dequantize(codes, scales, decode).double()
    noise = (w[0].double() - decoded).square().sum()
    torch.testing.assert_close(s.energies[0, 1], noise, rtol=1e-6, atol=0)
    underflowed = (scales == 0) & (w[0].unflatten(1, (4, 16)).abs().amax(-1) > 0)
    few = int(underflowed.sum())
    assert s.count("underflowed").tolist() == [few, 0, few]
    assert s.count("rows").tolist() == [8, 8, 8] and s.count("zero blocks")[1] == 32


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 24).bfloat16()}, "K a positive multiple of 16"),
        ({"x": torch.zeros(2, 32)}, "x is float32"),
        ({"experts": torch.zeros(3, dtype=torch.int32)}, r"experts is int32 \[3\]"),
        ({"experts": torch.zeros(2)}, "experts is float32"),
        ({"num_experts": 0}, "num_experts is 0; it must be an integer of at least 1"),
        ({"encode_scale": torch.ones(3)}, "encode_scale is float32 .*of 1 or 2 elements"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(2, 32).bfloat16()} | change
    with pytest.raises(ValueError, match=message):
        quantization_statistics(given.pop("x"), **given)


def of_local_experts(ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    here = (ids >= shape.offset) & (ids < shape.offset + shape.num_local)
    return torch.where(here, ids, -1)


@pytest.mark.parametrize(
    "shape", [SHAPE, Shape(7, 144, 80, 6, 3, 2, 3), Shape(7, 144, 80, 6, 3, 5, 1)], ids=str
)
def test_the_fused_call(shape):
    """The bits of a call without, and what a loop counts of its rows."""
    case = moe_cases.make(shape)
    given = {"num_experts": 6, "local_expert_offset": shape.offset}
    given |= {"nvfp4_4over6": FOUR.four_over_six, "fast_math": True}
    routing = (case.ids, case.weights)
    output, s = nvfp4_moe.fused_moe(case.x, case.experts, routing, **given, stats=True)
    assert_bitwise(output, nvfp4_moe.fused_moe(case.x, case.experts, routing, **given), "output")
    x = moe_cases.padded(case.x, case.experts.padded_hidden_size)
    steps = reference.fused_moe(
        quantize_activations(x, FOUR),
        case.experts,
        *routing,
        recipe=FOUR,
        local_expert_offset=shape.offset,
        keep_steps=True,
    ).steps
    ids = of_local_experts(case.ids, shape)
    assert_slow(s.hidden_states, slow(case.x, FOUR, ids, 6), "hidden states")
    rows = steps["intermediate"].flatten(0, 1)[:, : shape.intermediate]
    assert_slow(s.intermediate, slow(rows, FOUR, ids.flatten(), 6), "intermediate")


def test_ranks_add_up():
    """Whose experts are different ones: what is said where all are local."""
    whole = moe_cases.make(SHAPE)
    routing = (whole.ids, whole.weights)
    _, want = nvfp4_moe.fused_moe(whole.x, whole.experts, routing, stats=True)
    got = MoEStatistics.empty(6)
    for offset, local in ((0, 2), (2, 4)):
        some = slice(offset, offset + local)
        experts = nvfp4_moe.prepare_experts(whole.w13[some], whole.w2[some])
        _, s = nvfp4_moe.fused_moe(
            whole.x, experts, routing, num_experts=6, local_expert_offset=offset, stats=True
        )
        got = got + s
    for name, part in got.parts().items():
        assert_same(part, want.parts()[name], name)


def test_static_scales():
    """Calibrated for less than what comes: they saturate, and nothing else says so."""
    case = moe_cases.make(SHAPE)
    top = case.x.abs().max().item()
    found = {}
    for amax in (top, top / 16):
        experts = nvfp4_moe.prepare_experts(
            case.w13, case.w2, input_amax=amax, intermediate_amax=amax
        )
        given = (case.x, experts, (case.ids, case.weights))
        output, s = nvfp4_moe.fused_moe(*given, activation="static", stats=True)
        assert_bitwise(output, nvfp4_moe.fused_moe(*given, activation="static"), "output")
        assert_slow(
            s.hidden_states,
            slow(case.x, Recipe(), case.ids, 6, encode=experts.input_scale.item()),
            f"amax {amax}",
        )
        found[amax] = s
    good, bad = found.values()
    assert not good.hidden_states.count("saturated").any()
    assert bad.hidden_states.count("saturated").sum() > 0
    assert bad.hidden_states.total().snr() < good.hidden_states.total().snr() - 3
    want = reference.fused_moe(
        Activations(
            *nvfp4_moe.nvfp4_quantize(case.x, experts.input_scale, nvfp4_moe.SfLayout.layout_linear)
        ),
        experts,
        case.ids,
        case.weights,
        keep_steps=True,
    ).steps["activated"]
    largest = want.abs().amax().item() / experts.intermediate_scale.item()
    assert bad.intermediate.total().largest().item() == pytest.approx(largest, rel=1e-6)


def test_no_tokens():
    case = moe_cases.make(Shape(0, 128, 64, 6, 3))
    output, s = nvfp4_moe.fused_moe(case.x, case.experts, (case.ids, case.weights), stats=True)
    assert output.shape == (0, 128)
    for part in s.parts().values():
        assert_same(part, QuantizationStatistics.empty(6), "no tokens")


def test_gradients_are_left_alone():
    case = moe_cases.make(SHAPE)
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    output, s = nvfp4_moe.fused_moe(x, case.experts, (case.ids, weights), stats=True)
    assert not output.requires_grad and not s.intermediate.energies.requires_grad


def test_layers():
    case, other = moe_cases.make(SHAPE), moe_cases.make(SHAPE, seed=5)
    seen, singles = LayerStatistics(), []
    for layer, c in (("layers.0", case), ("layers.1", other), ("layers.0", other)):
        result = nvfp4_moe.fused_moe(c.x, c.experts, (c.ids, c.weights), stats=True)
        singles.append(result[1])  # to which nothing is added
        assert seen.record(layer, result) is result[0]
    assert list(seen) == ["layers.0", "layers.1"]
    for name, part in seen["layers.0"].parts().items():
        assert_same(part, (singles[0] + singles[2]).parts()[name], name)
        assert_same(seen["layers.1"].parts()[name], singles[1].parts()[name], name)
    lines = str(seen).splitlines()
    assert [line[:8] for line in lines[1:]] == ["layers.0", "layers.0", "layers.1", "layers.1"]
    assert lines[1].split()[3] == str(2 * 7 * 3)
    assert "hidden states, expert 5" in str(seen["layers.0"])


class TestBackends:
    @pytest.fixture(autouse=True)
    def flashinfer_would_serve(self, monkeypatch):
        pretend(monkeypatch)
        monkeypatch.delenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", raising=False)

    def explained(self, **changes):
        shape = replace(SHAPE, hidden=256, intermediate=128)  # which FlashInfer serves
        case = moe_cases.make(shape, mode=changes.get("activation", "per-token"))
        return nvfp4_moe.explain_fused_moe(
            case.x, case.experts, (case.ids, case.weights), capability=(10, 0), **changes
        )

    def test_automatic_calls_go_to_one_that_can(self):
        assert self.explained().backend == "flashinfer:trtllm"
        e = self.explained(stats=True)
        assert e.backend == "triton"
        assert "FlashInfer does not return" in e.reason("flashinfer:trtllm")

    def test_a_named_one_says_why(self):
        case = moe_cases.make(SHAPE)
        call = (case.x, case.experts, (case.ids, case.weights))
        for name in ("flashinfer:trtllm", "flashinfer:cute-dsl", "flashinfer:cutlass"):
            with pytest.raises(UnsupportedError, match="needs the intermediate"):
                nvfp4_moe.fused_moe(*call, backend=name, stats=True)

    def test_nothing_is_quantized(self):
        case = moe_cases.make(SHAPE, mode="bf16")
        call = (case.x, case.experts, (case.ids, case.weights))
        with pytest.raises(ValueError, match="no activations are quantized"):
            nvfp4_moe.fused_moe(*call, activation="bf16", stats=True)
        assert self.explained(activation="bf16", stats=True).backend is None

    def test_cutlass(self):
        case = moe_cases.make(SHAPE, mode="static")
        experts = nvfp4_moe.with_cutlass(case.experts)
        with pytest.raises(UnsupportedError, match='knows no build="cutlass"'):
            nvfp4_moe.fused_moe(
                case.x,
                experts,
                (case.ids, case.weights),
                activation="static",
                build="cutlass",
                stats=True,
            )

    def test_compiled(self):
        case = moe_cases.make(SHAPE)

        def call(x):
            routing = (case.ids, case.weights)
            return nvfp4_moe.fused_moe(x, case.experts, routing, fast_math=True, stats=True)

        with pytest.raises(Exception, match=r"torch\.compile cannot trace stats=True"):
            torch.compile(call, fullgraph=True, backend="aot_eager")(case.x)


def test_the_page_shows_what_its_programs_print():
    """Numbers to 1 %: those of random weights differ in their last bits between processors."""
    page = ROOT / "docs" / "telemetry.md"
    pairs = re.findall(r"```python\n(# prints.*?)```\n+```text\n(.*?)```", page.read_text(), re.S)
    assert len(pairs) == 2
    for program, text in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
        got, want = (
            [re.split(r"\s{2,}", line) for line in lines.splitlines()]
            for lines in (printed.getvalue(), text)
        )
        assert [len(line) for line in got] == [len(line) for line in want]
        cells = ([cell for line in lines for cell in line] for lines in (got, want))
        for a, b in zip(*cells, strict=True):
            numbers = [re.fullmatch(r"([\d.]+)%?", cell) for cell in (a, b)]
            if all(numbers):
                x, y = (float(number[1]) for number in numbers)
                assert x == pytest.approx(y, rel=1e-2, abs=0.02), (a, b)
            else:
                assert a == b
