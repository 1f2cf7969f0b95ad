"""The example of `docs/perplexity.md` in small: no package with the model, no tokenizer."""

# SPDX-License-Identifier: Apache-2.0
import math
import re

import perplexity_page
import pytest
import smollm2_perplexity
import torch
from feed_forward import relative_error, unquantized_layer
from gguf_cases import HIDDEN, INNER, LAYERS, VOCABULARY, tiny_file
from gguf_file import read
from methods import METHODS
from paths import ROOT
from perplexity_page import BASELINE, EXACT, MARKS, SHOWN, SPLIT, Results, decibels, tables
from smollm2 import Dense, SmolLM2
from smollm2_perplexity import LABELS, experts_of, layers_of, measure, ranges_of, split

PAGE = ROOT / "docs" / "perplexity.md"
EXPERTS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SmolLM2:
    file = read(tiny_file(tmp_path_factory.mktemp("gguf") / "f"))
    return SmolLM2.of(file, torch.float32, "cpu")


@pytest.fixture
def ids() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(6)
    drawn = torch.randint(0, VOCABULARY, (2, 3, 9), generator=g)
    return drawn[0], drawn[1]


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_the_experts_sum_to_the_layer(model, experts):
    dense = model.to(torch.float64).dense(0)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4)).double()
    parts = split(dense, experts)
    assert parts["w13"].shape == (experts, 2 * INNER // experts, HIDDEN)
    assert parts["w2"].shape == (experts, HIDDEN, INNER // experts)
    wanted = dense(x)
    # The sum is taken in fp32, as the fused call takes it.
    atol = 1e-6 * wanted.abs().max()
    found = unquantized_layer(experts_of(parts))(x)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=atol)


def test_the_fused_call_is_the_layer_where_nothing_is_rounded():
    """Weights on NVFP4's grid, activations not quantized: only bf16's roundings are left."""
    g = torch.Generator().manual_seed(5)

    def grid(*shape: int) -> torch.Tensor:
        values = torch.tensor([-6, -1, 0, 0, 0, 0, 0.5, 6.0])
        drawn = values[torch.randint(0, 8, shape, generator=g)]
        drawn.flatten()[::16] = 6.0  # the maximum of each block
        return drawn.bfloat16() / 64

    weights = {"gate": (64, 32), "up": (64, 32), "down": (32, 64)}
    dense = Dense(*(grid(*shape) for shape in weights.values()))
    x = torch.randn(7, 32, generator=g).bfloat16() * 8
    layer = smollm2_perplexity.nvfp4_layer(
        METHODS["NVFP4 weights, bf16 activations"],
        split(dense, EXPERTS),
        smollm2_perplexity.ActivationType.Swiglu,
        0,
        {},
    )
    wanted = Dense(*(w.double() for w in vars(dense).values()))(x.double())
    assert relative_error(layer(x), wanted) < 2**-8


def test_every_method_differs_from_the_others(model, ids):
    """A method whose settings were dropped would give another's bits."""
    bf16 = model.to(torch.bfloat16)
    ranges = {"these": ranges_of(bf16, ids[0]), "others": ranges_of(bf16, ids[1])}
    given = ranges["these"].inputs[0]
    found = {
        label: layers_of(label, bf16, ranges, EXPERTS)[0](given) for label in (SPLIT, *METHODS)
    }
    for label, output in found.items():
        assert [other for other in found if torch.equal(found[other], output)] == [label]


def test_a_run(model, ids):
    """Every figure of the page, from the definitions."""
    labels = (SPLIT, "per-token scales")
    bf16 = model.to(torch.bfloat16)
    with torch.no_grad():
        results = measure(model, bf16, ids, labels, EXPERTS)
        logits = [m.logits(m.hidden(ids[0])).double() for m in (model, bf16)]
        logits[1] = model.logits(bf16.hidden(ids[0])).double()
    p, q = (each[:, :-1].softmax(-1) for each in reversed(logits))  # bf16's, fp32's
    picked = q.gather(2, ids[0][:, 1:, None])[..., 0]
    torch.testing.assert_close(results.losses[EXACT], -picked.log(), rtol=1e-4, atol=1e-4)
    divergence = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(results.divergences[EXACT], divergence, rtol=1e-3, atol=1e-6)
    assert results.same_token[EXACT] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert results.perplexity(EXACT) == pytest.approx((1 / picked).log().mean().exp().item(), 1e-4)
    assert not results.divergences[BASELINE].any() and results.same_token[BASELINE] == 1
    assert all(0 < change < 1e-6 for change in results.cut)
    # The cut alone costs bf16's roundings, NVFP4 more.
    cut, nvfp4 = (results.by_layer[label] for label in labels)
    assert len(cut) == len(nvfp4) == LAYERS == len(results.spread)
    assert max(cut) < 1e-2 < min(nvfp4) < max(nvfp4) < 0.5
    assert results.divergences[labels[1]].mean() > 10 * results.divergences[SPLIT].mean()
    text = tables(results, labels)
    assert [
        line.split(" | ")[0] for line in text.splitlines() if line.startswith("| per-token")
    ] == ["| per-token scales"] * 2


def test_the_increase_is_paired_by_text():
    """Texts of different difficulty do not widen its error."""
    base = torch.tensor([[1.0, 2.0], [5.0, 6.0], [9.0, 8.0]], dtype=torch.float64)
    more = torch.tensor([[0.1, 0.3], [0.2, 0.2], [0.3, 0.3]], dtype=torch.float64)
    increase, error = Results({BASELINE: base, "a": base + more}).increase("a")
    assert increase == pytest.approx(0.7 / 3)
    by_text = torch.tensor([0.2, 0.2, 0.3], dtype=torch.float64)
    assert error == pytest.approx(by_text.std().item() / math.sqrt(3))


def test_outliers_are_of_the_median_row():
    x = torch.zeros(3, 4)
    x[0, 0], x[1, :], x[2, :2] = 3.0, 2.0, 1.0  # 2, 1 and sqrt(2) times their root mean square
    eye = torch.eye(4)
    first, second = smollm2_perplexity.outliers(Dense(eye * 50, eye, eye), x)
    assert first == pytest.approx(math.sqrt(2)) == second


def test_decibels():
    assert decibels(0.1) == pytest.approx(20) and decibels(1.0) == 0


def test_the_page_has_what_the_script_makes():
    """Rows of every method in both tables, in order, and the plot's too."""
    page = PAGE.read_text("utf-8")
    made = page.split(MARKS[0])[1].split(MARKS[1])[0]
    labels = [line.split(" | ")[0][2:] for line in made.splitlines() if line.startswith("| ")]
    assert labels[2 : 4 + len(LABELS)] == [EXACT, BASELINE, *LABELS]
    assert labels[-len(LABELS) :] == [*LABELS]
    assert f"| layer | {' | '.join(map(str, SHOWN))} |" in made
    assert "](perplexity.svg)" in page
    drawn = (PAGE.parent / "perplexity.svg").read_text("utf-8")
    places = [drawn.find(f">{label}<") for label in LABELS[1:]]
    assert -1 not in places and places == sorted(places)


def test_the_plot_is_readable_on_both_grounds(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    g = torch.Generator().manual_seed(1)
    base = torch.rand(3, 4, generator=g, dtype=torch.float64)
    results = Results({BASELINE: base}, by_layer={label: [0.1, 0.2] for label in METHODS})
    for i, label in enumerate(METHODS, 1):
        results.losses[label] = base * (1 + i)
    perplexity_page.plot(perplexity_page.lines(results, METHODS), tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text("utf-8")
    assert [label for label in METHODS if f">{label}<" not in text] == []
    assert not re.search("#000000|#ffffff", text)
