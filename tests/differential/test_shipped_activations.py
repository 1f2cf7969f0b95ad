"""SmolLM2's activations in the package: how they are captured, and what the README says of them."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from gguf_cases import HIDDEN, INNER, tiny_file
from gguf_file import read
from smollm2 import SmolLM2
from smollm2_activations import LAYERS, STEP, TEXTS, captured
from smollm2_perplexity import TOKENS

from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import activations, choose


def test_every_step_th_token_is_captured(tmp_path):
    model = SmolLM2.of(read(tiny_file(tmp_path / "f")), torch.bfloat16, "cpu")
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    seen = {}

    def feed_forward(layer, x):
        seen[layer] = x
        return model.dense(layer)(x)

    with torch.no_grad():
        model.hidden(ids, feed_forward)
    found = captured(model, ids, (1,), 2)
    assert list(found) == ["smollm2.layer1.ffn_in", "smollm2.layer1.ffn_mid"]
    x, mid = found.values()
    assert x.shape == (4, HIDDEN) and mid.shape == (4, INNER)
    assert torch.equal(x, seen[1][[0, 2, 4, 6]])
    dense = model.to(torch.float64).dense(1)
    wanted = torch.nn.functional.silu(x.double() @ dense.gate.T) * (x.double() @ dense.up.T)
    torch.testing.assert_close(mid.double(), wanted, rtol=2**-6, atol=2**-6)


def median_ratio(x: torch.Tensor) -> float:
    """Divide each row's maximum by its root mean square; the median."""
    x = x.float()
    return (x.abs().amax(1) / x.square().mean(1).sqrt()).median().item()


def test_outliers_are_twice_those_of_minilm():
    shipped = inputs.activations()
    rows = TEXTS * TOKENS // STEP
    for layer in LAYERS:
        x, mid = (shipped[f"smollm2.layer{layer}.ffn_{part}"] for part in ("in", "mid"))
        assert (x.shape, mid.shape) == ((rows, 576), (rows, 1536))
        assert x.dtype == mid.dtype == torch.bfloat16
        assert 11 < median_ratio(x) < 18
    for layer in (0, 2, 5):
        assert 5 <= round(median_ratio(shipped[f"layer{layer}.ffn_in"])) <= 6


@pytest.mark.parametrize("part", ["in", "mid"])
def test_diff_compares_them(part):
    compared = {name: pieces for name, _, pieces in activations(None, choose("plain"), False)}
    for layer in LAYERS:
        (piece,) = compared[f"smollm2.layer{layer}.ffn_{part}"]
        assert piece.x.shape[0] == 24 and len(piece.cases) > 10
