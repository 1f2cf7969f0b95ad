"""The example of `docs/embeddings.md` in small: no package with the model, no tokenizer."""

# SPDX-License-Identifier: Apache-2.0
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F
from embeddings import errors, experts_of, layers_of, neighbours, ranges_of, split
from embeddings_page import BASELINE, MARKS, SPLIT, Results, tables
from feed_forward import unquantized_layer
from methods import METHODS
from minilm import EPSILON, HEADS, LAYERS, Dense, MiniLM
from pages import between_marks
from paths import ROOT
from sentences import sentences, sentences_of
from strips import BINS_A_DECADE, LEFT, WIDTH, histogram, median, strips, ticks

DOCS = ROOT / "docs"
H, I = 192, 768  # noqa: E741


def dense(dtype: torch.dtype) -> Dense:
    g = torch.Generator().manual_seed(3)
    shapes = ((I, H), (I,), (H, I), (H,))
    return Dense(*(torch.randn(shape, generator=g).to(dtype) for shape in shapes))


def x(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(5, H, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("experts", [1, 3, 6])
def test_the_experts_sum_to_the_layer(experts):
    whole, parts = dense(torch.float64), split(dense(torch.float64), experts)
    wanted = whole(x(torch.float64))
    # The sum is taken in fp32, as the fused call takes it.
    torch.testing.assert_close(
        unquantized_layer(experts_of(parts))(x(torch.float64)),
        wanted,
        rtol=1e-6,
        atol=1e-6 * wanted.abs().max(),
    )


def grid(*shape: int) -> torch.Tensor:
    """Values of NVFP4 with every scale 1, few enough for exact sums."""
    g = torch.Generator().manual_seed(sum(shape))
    values = torch.tensor([-6, -1, 0, 0, 0, 0, 0.5, 6.0])
    drawn = values[torch.randint(0, 8, shape, generator=g)]
    drawn.flatten()[::16] = 6.0  # the maximum of each block
    return drawn.bfloat16()


def test_the_fused_call_is_the_layer_where_nothing_is_rounded():
    """Weights on NVFP4's grid, activations not quantized: only bf16's roundings are left."""
    shapes = {"intermediate.dense": (768, 128), "output.dense": (128, 768)}
    weights = {name: (grid(*shape) / 64, grid(shape[0]) / 2) for name, shape in shapes.items()}
    model = MiniLM(
        {
            f"encoder.layer.{layer}.{name}.{kind}": tensor
            for layer in range(LAYERS)
            for name, pair in weights.items()
            for kind, tensor in zip(("weight", "bias"), pair, strict=True)
        }
    )
    given = x(torch.bfloat16)[:, :128].contiguous()
    found = layers_of("NVFP4 weights, bf16 activations", model, {})[0](given)
    wanted = layers_of(SPLIT, model, {})[0](given)
    off = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert off < 2**-8


def test_the_model_is_the_one_of_pytorchs_encoder_layers():
    """BERT's layer is `torch.nn.TransformerEncoderLayer`; the embedding is the mean of its tokens."""
    model, ids = tiny_model(), torch.tensor([5, 6, 7, 1])
    t = model.tensors
    y = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][:4]
    y = F.layer_norm(y + t["embeddings.token_type_embeddings.weight"][0], y.shape[-1:], eps=EPSILON)
    for i in range(LAYERS):
        y = encoder_layer(t, f"encoder.layer.{i}")(y[None])[0]
    wanted = F.normalize(y.mean(0), dim=0).double()
    torch.testing.assert_close(model.embed([ids.tolist()])[0], wanted, rtol=0, atol=1e-6)


def encoder_layer(tensors: dict[str, torch.Tensor], at: str) -> torch.nn.Module:
    h = 4 * HEADS
    layer = torch.nn.TransformerEncoderLayer(
        h, HEADS, 2 * h, dropout=0, activation="gelu", layer_norm_eps=EPSILON, batch_first=True
    )
    names = {"out_proj": "attention.output", "linear1": "intermediate", "linear2": "output"}
    names = {new: f"{old}.dense" for new, old in names.items()}
    names["self_attn.out_proj"] = names.pop("out_proj")
    names |= {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    state = {
        f"{new}.{kind}": tensors[f"{at}.{old}.{kind}"]
        for new, old in names.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        parts = [
            tensors[f"{at}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")
        ]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    layer.load_state_dict(state)
    return layer.requires_grad_(False)


def test_each_sentence_is_embedded_in_its_own_place():
    """Batches are by length; the order given and what else is in the call change nothing."""
    model, ids = tiny_model(), [[5, 6, 7], [8, 9], [1, 2, 3], [4, 4, 4, 4], [9, 8]]
    together = model.embed(ids)
    for i, one in enumerate(ids):
        torch.testing.assert_close(model.embed([one])[0], together[i], rtol=0, atol=1e-6)
    assert errors(together[:1], together[2:3]).item() > 1e-3


def tiny_model() -> MiniLM:
    """Random weights under the checkpoint's names; H is 48."""
    g, h = torch.Generator().manual_seed(1), 4 * HEADS
    shapes = {
        f"embeddings.{name}_embeddings.weight": (rows, h)
        for name, rows in (("word", 10), ("position", 8), ("token_type", 2))
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        linear = {f"attention.self.{part}": (h, h) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (h, h)}
        linear |= {"intermediate.dense": (2 * h, h), "output.dense": (h, 2 * h)}
        shapes |= {f"{at}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in linear.items()}
    tensors = {name: torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}
    for at in ("embeddings", *(f"encoder.layer.{i}" for i in range(LAYERS))):
        for norm in (at,) if at == "embeddings" else (f"{at}.attention.output", f"{at}.output"):
            tensors[f"{norm}.LayerNorm.weight"] = torch.ones(h)
            tensors[f"{norm}.LayerNorm.bias"] = torch.zeros(h)
    return MiniLM(tensors)


def test_every_method_differs_from_the_others():
    """A method whose settings were dropped would give another's bits."""
    model, ids = tiny_model(), [[5, 6, 7, 1], [8, 9], [3, 3, 2, 1]]
    bf16 = MiniLM({n: t.bfloat16() for n, t in model.tensors.items()})
    ranges = {"these": ranges_of(bf16, ids), "others": ranges_of(bf16, [[1, 2], [2, 1]])}
    given = ranges["these"].inputs[0]
    found = {label: layers_of(label, bf16, ranges)[0](given) for label in (SPLIT, *METHODS)}
    for label, output in found.items():
        same = [other for other in found if torch.equal(found[other], output)]
        assert same == [label]


def test_errors_are_one_less_the_cosine():
    a, b = (torch.nn.functional.normalize(t.double(), dim=1) for t in (grid(4, 16), grid(16, 4).T))
    torch.testing.assert_close(errors(a, b), 1 - (a * b).sum(1))


def test_no_sentence_is_its_own_neighbour():
    points = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], dtype=torch.float64), dim=1
    )
    assert neighbours(points).tolist() == [1, 0, 3, 2]


def test_sentences_are_a_few_hundred_and_shared_by_no_set():
    evaluated, calibration = sentences()
    assert 200 <= len(evaluated) <= 500 and 200 <= len(calibration) <= 500
    assert len({*evaluated, *calibration}) == len(evaluated) + len(calibration)
    assert (evaluated, calibration) == sentences()


def test_only_prose_is_taken():
    text = (
        "A title\n*******\n\n"
        "Here a list of some words begins\n   and its indented lines are left out.\n\n"
        "This names a = b, which is code and no sentence of English.\n\n"
        "Too short. The first of two sentences is wrapped onto a\nsecond line. "
        "Is the second one, which asks, taken as well?"
    )
    assert sentences_of(text) == [
        "The first of two sentences is wrapped onto a second line.",
        "Is the second one, which asks, taken as well?",
    ]


def test_tables_have_each_method_and_its_figures():
    some = torch.tensor([1e-3, 2e-3, 4e-3], dtype=torch.float64)
    results = Results(
        {"a": some, "b": 10 * some},
        {BASELINE: some / 100, "a": some, "b": 20 * some},
        {"a": 1.0, "b": 0.5},
        {"a": [0.25, 0.5], "b": [0.1, 0.125]},
        [(2.0, 3.0), (4.0, 24.0)],
    )
    lines = tables(results, ("a", "b")).splitlines()
    assert f"| {BASELINE} | 0 | 0 | 0 | 2.00e-05 | 100 % |" in lines
    assert "| b | 2.00e-02 | 3.60e-02 | 4.00e-02 | 4.00e-02 | 50 % |" in lines
    assert "| largest row maximum / smallest, intermediate | 3 | 24 |" in lines
    assert "| a | 25.00 % | 50.00 % |" in lines


def test_only_what_is_between_the_marks_is_replaced():
    page = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert between_marks(page, "new", MARKS) == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"


def test_the_plot_draws_every_value_where_it_lies():
    bins = BINS_A_DECADE
    assert histogram([-2.0, -2.0, -2.0 + 0.9 / bins, 0.5]) == {-2 * bins: 3, bins // 2: 1}
    assert median([1.0, 2.0, 4.0, 8.0]) == 3.0
    drawn = strips("title <", "axis", {"low": [1e-3, 1e-3, 1e-2], "high": [1e-1, 0.9]})
    root = ElementTree.fromstring(drawn)
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:4] == ["low", "0.00100", "high", "0.300"]
    # The axis has three decades, from 1e-3 to 1: each median at its share of the width.
    shares = [0, (math.log10(0.3) + 3) / 3]
    medians = [p.get("d") for p in root.iter() if p.get("class") == "middle"]
    assert [d.split()[0] for d in medians] == [f"M{LEFT + WIDTH * s:.1f}" for s in shares]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0085, 0.126, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]),
        (0.01, 0.02, [0.01, 0.02]),
        (1.9, 51, [1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_the_axis_covers_the_values(low, high, marks):
    assert ticks(low, high) == marks


def test_the_page_has_what_the_script_makes():
    """Rows of every method in both tables, in order, and the plot's too."""
    page = (DOCS / "embeddings.md").read_text()
    made = page.split(MARKS[0])[1].split(MARKS[1])[0]
    labels = [line.split(" | ")[0][2:] for line in made.splitlines() if line.startswith("| ")]
    methods = [SPLIT, *METHODS]
    assert labels[2:] == [
        BASELINE,
        *methods,
        "layer",
        "---",
        *(f"largest row maximum / smallest, {of}" for of in ("input", "intermediate")),
        *methods,
    ]
    assert "](embeddings.svg)" in page
    root = ElementTree.parse(DOCS / "embeddings.svg")
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[: 2 * len(METHODS) : 2] == [*METHODS]
