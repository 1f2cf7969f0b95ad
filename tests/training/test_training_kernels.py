"""The backward's Triton kernels: weights decoded to the bit, and every activation's derivative."""

# SPDX-License-Identifier: Apache-2.0
from typing import get_args

import pytest
import torch
import training_cases as cases
from assertions import assert_bitwise
from moe_cases import GATED, PLAIN, Shape, weights_of
from mutants.generated import training_calls

from nvfp4_moe import prepare_experts
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.training import activation, grouped, operands
from nvfp4_moe.training.gradient import Backward

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
SHAPES = [Shape(5, 208, 80, 3, 2), Shape(5, 128, 1040, 2, 2)]  # one and two blocks of columns
EDGES = {name: call for name, call in training_calls.named() if not name.startswith("far")}
MODES = [(mode, backward) for mode in ("bf16", "per-token") for backward in get_args(Backward)]


@pytest.fixture
def kernels(monkeypatch):
    """Let the interpreter's kernels run on the CPU, as on an H200."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(grouped, "of_device", lambda device: (9, 0))
        for module in (grouped, operands, activation):
            monkeypatch.setattr(module, "runs_triton", lambda t: True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [GATED[0], PLAIN[0]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_weights(kernels, device, kind, shape):
    w13, w2 = (w.to(device) for w in weights_of(shape, kind))
    experts = prepare_experts(w13, w2, kind)
    for decoded in (operands.first_matrices, operands.second_matrices):
        got = decoded(experts, torch.bfloat16).values
        want = decoded(experts, torch.float32).values  # by the reference
        assert_bitwise(got.float(), want, decoded.__name__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [GATED[0], PLAIN[0]], ids=lambda kind: kind.name)
def test_the_first_product_of_codes(kernels, device, kind):
    """Sizes that are padded, and slots of no expert: against a loop over experts in fp64."""
    shape = Shape(9, 208, 80, 3, 2)
    w13, w2 = (w.to(device) for w in weights_of(shape, kind))
    experts = prepare_experts(w13, w2, kind)
    ids = torch.tensor([[0, 2], [2, -1], [1, 7], [2, 0], [-1, -1], [0, 1], [1, 2], [2, 1], [0, 2]])
    ids = ids.to(device, torch.int32)
    s = grouped.sort_slots(ids, 3)
    g = torch.Generator().manual_seed(5)
    states = torch.randn(9, 208, generator=g, dtype=torch.float32).bfloat16().to(device)
    codes = operands.quantized(states, Recipe())
    w = operands.first_matrices(experts, torch.float32)
    x = operands.values_of(codes, torch.float32).at(s.token)
    got = operands.first_product(x, codes, w, experts, ids, s)
    assert got.dtype == torch.float32 and got.shape == (18, w.values.shape[1])
    rows, of_row = x.values.double(), w.values.double()[s.expert]
    want, size = (
        torch.einsum("nk,nmk->nm", *pair) for pair in ((rows, of_row), (rows.abs(), of_row.abs()))
    )
    used = int(s.ends[-1])
    assert used == 14
    error = (got.double() - want).abs() / size
    assert error[:used].max() < 2**-20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("kind", [*GATED, *PLAIN], ids=lambda kind: kind.name)
def test_every_activation_and_its_derivative(kernels, device, kind, scaled):
    """Against torch in fp32, on both sides of the clamps; bf16 results are rounded by 2^-9."""
    g = torch.Generator().manual_seed(1)
    n, i, experts = 40, 72, 3
    m = i * (2 if kind.gated else 1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float32)

    w13, w2 = weights_of(Shape(n, 64, 80, experts, 1), kind)
    options = cases.options_of(kind) if scaled else {}
    prepared = prepare_experts(w13.to(device), w2.to(device), kind, **options)
    parts = m // i
    factors = [torch.rand(*s, generator=g, dtype=torch.float32) + 0.5 for s in ((n, 1), (n, 1))]
    scales = [torch.rand(experts, parts, generator=g, dtype=torch.float32) + 0.5 for _ in range(2)]
    x = activation.Sums(
        (3 * normal(n, m)).bfloat16().to(device),
        factors[0].to(device) if scaled else None,
        normal(m, experts).to(device).mT if scaled else None,
        scales[0].to(device),
        torch.arange(n, dtype=torch.int64, device="cpu").remainder(experts).sort()[0].to(device),
    )
    d = normal(n, i).bfloat16().to(device)
    more = [t.to(device) if scaled else None for t in (scales[1], factors[0])]
    results = []
    for each in (d, d.float()):
        incoming = activation.Incoming(each, factors[1].to(device), *more)
        a, d_raw = activation.activation_and_gradient(x, prepared, incoming)
        results.append({"a": a} | d_raw._asdict())
    got, want = results
    for name, a in got.items():
        b = want[name]
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        error = (a.double() - b.double()).abs()
        # `a` of both is rounded, and may be neighbours; 2^-18 for what cancels within a derivative.
        most = b.double().abs() * 2**-7 if name == "a" else b.double().abs() * 2**-8
        assert (error <= most + 2**-18).all(), f"{name}: {error.max():.3g}"
        assert (b != 0).float().mean() > 0.2, name
    assert scaled or got["for_x"] is got["for_w13"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EDGES)
def test_arguments_at_every_edge(device, name):
    """The limits themselves, zeros, NaN, huge numbers, rows of several blocks: against fp64."""
    call = EDGES[name]()
    assert call.judge().accepts(call.answer(device))


@pytest.mark.parametrize("device", DEVICES)
def test_experts_without_rows(kernels, device):
    """Whatever torch's kernel leaves there; one product is larger than a program's block."""
    for shape in ((6, 3, 5), (4, 65, 130)):
        ends = torch.tensor([0, 2, 2, 7, 9, 9][: shape[0]], dtype=torch.int32, device=device)
        t = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        got = grouped._zero_empty(t, ends)
        filled = torch.tensor([False, True, False, True, True, False][: shape[0]])
        assert got[filled].isnan().all() and not got[~filled].any(), shape


@pytest.mark.interpreter
@pytest.mark.parametrize(("mode", "backward"), MODES)
def test_gradients_through_the_kernels(kernels, mode, backward):
    """On a GPU `test_training_triton.py` compares them with the CPU's."""
    case = cases.make(Shape(6, 48, 32, 4, 2), biases=True, clamp_limit=1.5)
    recipe = None if mode == "bf16" else Recipe()
    cases.gradients_are_those_of_autograd(
        case, recipe, mode, torch.bfloat16, activation_mode=mode, backward=backward
    )
