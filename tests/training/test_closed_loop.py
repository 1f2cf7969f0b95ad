"""`examples/closed_loop.py`: what its tables count, and the loop with transformers' `generate`.

`make test-transformers` runs the loop; `make server-test` has it with vLLM.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from loop import calls, float64
from torch.nn import functional


def test_a_bit_that_differs_is_counted():
    a = torch.randn(3, 5).bfloat16()
    b = a.clone()
    b[1, 2] = -b[1, 2]
    assert calls.differing(a, b) == (15, 1)
    assert calls.differing(torch.tensor([0.0]), torch.tensor([-0.0])) == (1, 1)
    assert calls.differing(torch.tensor([1, 2]), torch.tensor([1, 3])) == (2, 1)
    with pytest.raises(ValueError, match=r"bfloat16 \(3, 5\) beside torch.float32 \(3, 5\)"):
        calls.differing(a, b.float())


def double(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * 2


def recorded() -> dict[int, calls.Rows]:
    recorder = calls.Recorder(on=True)
    for layer in (0, 1, 0):
        x = torch.randn(4, 8).bfloat16()
        recorder.add(layer, x, torch.zeros(4, 2).int(), torch.ones(4, 2), double(x, x, x))
    recorder.on = False
    recorder.add(1, *recorder.calls[0][1])
    rows = recorder.taken()
    assert recorder.calls == [] and {n: len(r.x) for n, r in rows.items()} == {0: 8, 1: 4}
    return rows


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_the_same_rows_are_run_again(batch):
    shapes = []

    def seen(x, ids, weights):
        shapes.append(len(x))
        return double(x, ids, weights)

    assert calls.again(recorded(), [seen, seen], batch, least=10**6) == (12 * 8, 0)
    assert shapes == {None: [8, 4], 1: [1] * 12, 3: [3, 3, 2, 3, 1]}[batch]


def test_other_experts_of_one_layer_are_found():
    assert calls.again(recorded(), [double, lambda x, i, w: x], None, least=10**6) == (96, 32)
    assert calls.again(recorded(), [double, lambda x, i, w: x], None, least=33) == (48, 24)


@pytest.mark.parametrize("name", ["linear", "matmul", "softmax", "mean", "sum"])
def test_sums_in_float64_show_no_batch(name):
    """Sums of bf16 that cancel: their order decides, where they are not in fp64."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(64, 512, generator=g).bfloat16()
    w = torch.randn(32, 512, generator=g).bfloat16()
    function = {
        "linear": lambda t: functional.linear(t, w),
        "matmul": lambda t: t @ w.T,
        "softmax": lambda t: t.softmax(-1, dtype=torch.float32),
        "mean": lambda t: t.mean(-1, keepdim=True),
        "sum": lambda t: t.sum(-1, keepdim=True),
    }[name]
    exact = function(x.double()) if name in ("mean", "sum") else None
    with float64.Float64():
        made = function(x)
        rows = torch.cat([function(row[None]) for row in x])
    assert torch.equal(made, rows)
    assert made.dtype == (torch.float32 if name == "softmax" else torch.bfloat16)
    if exact is not None:
        assert torch.equal(made, exact.bfloat16())
    if name in ("linear", "matmul"):
        assert torch.equal(made, (x.double() @ w.double().T).bfloat16())


def test_operations_outside_the_table_stay():
    with float64.Float64():
        assert torch.tensor([1, 2]).sum() == 3
        assert (torch.ones(2).bfloat16() + 1).dtype == torch.bfloat16


def test_places_that_only_one_has_are_left_out():
    """A sampler computes the last logits of a prompt alone."""
    a = {"lm_head[0]": [torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)]}
    b = {"lm_head[0]": [torch.cat([torch.ones(2, 1, 3), torch.zeros(2, 2, 3)], 1)]}
    assert float64.compared(a, b) == (12, 0)
    b["lm_head[0]"][0][1, 2, 0] = 1
    assert float64.compared(a, b) == (12, 1)
    with pytest.raises(ValueError, match="modules of one alone"):
        float64.compared(a, {})


@pytest.fixture(scope="module")
def loop():
    pytest.importorskip(
        "transformers", reason="transformers is not installed (make test-transformers)"
    )
    import closed_loop

    return closed_loop


SMALL = {"learn": 5, "reinforce": 1, "texts": 3, "length": 5, "least": 4000}


@pytest.fixture(scope="module")
def found(loop):
    threads = torch.get_num_threads()
    yield loop.run("transformers", "cpu", loop.Sizes(**SMALL))
    torch.set_num_threads(threads)


def test_the_experts_of_all_programs_have_the_same_bits(found):
    cells = [line.split(" | ") for line in found["same inputs"][2:]]
    assert len(cells) == 7
    for _, _, outputs, differ in cells:
        assert int(outputs.replace(",", "")) >= SMALL["least"] and differ == "0 |"


def test_a_trainer_with_the_samplers_arithmetic_agrees_with_it(found):
    sampled = SMALL["texts"] * SMALL["length"]
    quantized = [*found["fake-quantized"], *found["generate"]]
    least = min(row.kl for row in quantized if row.trainer.startswith("bf16"))
    for row in [*found["plain"][1:], *quantized]:
        assert row.sampled == sampled and len(row.logs) == sampled
        if row.trainer == "ours; eager attention, sums in fp64":
            assert row.differ == row.kl == max(row.logs) == 0, row
        elif row.trainer.startswith("ours"):
            assert row.kl < least / 10, row
        else:
            assert row.differ > sampled / 2 and row.kl > 0 and max(row.logs) > 1e-3, row


def test_what_is_claimed_of_the_other_operations_was_compared(found):
    assert len(found["others"]) == 2 + 3
    for line, words in zip(found["others"][2:], ("sdpa", "eager attention", "fp64"), strict=True):
        outputs, differ = line.rstrip(" |").split(" | ")[1:]
        assert int(outputs.replace(",", "")) > 100_000 and words in line
        assert differ == "0" or "fp64" not in line


@pytest.fixture(scope="module")
def pair(loop):
    """A trainer, and a sampler whose second layer holds other weights."""
    loop.register()
    trainer = loop.Trainer(loop.new_model(), loop.OURS, "cpu")
    sampler = loop.TransformersSampler(trainer.model, "per token")
    wrong = -loop.experts_modules(trainer.model)[1].down_proj.detach()
    w13, _ = loop.samplers.weights_of(trainer.model)[1]
    sampler.experts[1].load_(w13, wrong)
    return trainer, sampler


def test_other_weights_of_the_sampler_are_found(loop, pair):
    trainer, sampler = pair
    prompts = loop.Text(loop.PROMPT).some(2)
    table = loop.same_inputs(trainer, sampler, prompts, loop.Sizes(texts=2, length=3, least=100))
    for line in table[2:]:
        compared, differ = (int(c.replace(",", "")) for c in line.rstrip(" |").split(" | ")[2:])
        beside_itself = "trainer" not in line
        assert (differ == 0) if beside_itself else (0.4 * compared < differ <= compared / 2), line
    experiment = loop.Experiment.__new__(loop.Experiment)
    with pytest.raises(RuntimeError, match="the sampler's experts are not the trainer's"):
        experiment._check(trainer, sampler)
    sampler.reload(trainer.model)
    experiment._check(trainer, sampler)


def test_routes_are_replayed(loop, pair):
    trainer, _ = pair
    texts = loop.Text(loop.PROMPT).some(2)
    ids = torch.randint(16, (2, loop.PROMPT - 1, 2, 8)).sort(-1)[0]
    with loop.replayed(trainer.model, ids), loop.recorded(trainer.model) as recorder:
        trainer.log_probabilities(texts, 4)
    for layer, rows in recorder.taken().items():
        assert torch.equal(rows.ids, ids[:, :, layer].flatten(0, 1))
        assert (rows.weights.float().sum(1) - 1).abs().max() < 0.02


def test_replay_of_its_own_routes_changes_no_bit_of_a_trainer(loop, pair):
    """The weights that `route` computes of recorded ids are transformers' own, rounded to bf16."""
    trainer, _ = pair
    texts = loop.Text(loop.PROMPT).some(8)
    with loop.recorded(trainer.model) as recorder:
        want = trainer.log_probabilities(texts, 4)
    own = recorder.taken()
    ids = torch.stack([rows.ids for rows in own.values()], 1).unflatten(0, (8, -1))
    with loop.replayed(trainer.model, ids), loop.recorded(trainer.model) as recorder:
        made = trainer.log_probabilities(texts, 4)
    for layer, rows in recorder.taken().items():
        assert torch.equal(rows.ids, own[layer].ids)
        assert calls.differing(rows.weights, own[layer].weights).differ == 0
    assert calls.differing(made, want).differ == 0
    (grad,) = torch.autograd.grad(made.sum(), [trainer.model.model.layers[0].mlp.gate.weight])
    assert grad.isfinite().all() and (grad != 0).any()
