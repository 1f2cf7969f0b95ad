"""A wrong kernel in a server's layer is caught and can be replayed; a right one gives no alarm."""

# SPDX-License-Identifier: Apache-2.0
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvfp4_moe import __main__, fused_moe, prepare_experts
from nvfp4_moe.canary import Canary, from_environment
from nvfp4_moe.differential import own_backend

H, INTERMEDIATE, E, K = 128, 128, 8, 2
WRONG = "own_backends:layer_without_a_tile"


def experts(seed: int = 0, h: int = H):
    g = torch.Generator(device="cpu").manual_seed(seed)
    w13 = torch.randn(E, 2 * INTERMEDIATE, h, generator=g, dtype=torch.float32, device="cpu")
    w2 = torch.randn(E, h, INTERMEDIATE, generator=g, dtype=torch.float32, device="cpu")
    return prepare_experts(w13.bfloat16(), w2.bfloat16())


def call(tokens: int, seed: int, h: int = H):
    g = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(tokens, h, generator=g, dtype=torch.float32, device="cpu").bfloat16()
    weights = torch.rand(tokens, K, generator=g, dtype=torch.float32, device="cpu")
    ids = torch.rand(tokens, E, generator=g, dtype=torch.float32, device="cpu").topk(K).indices
    return x, (ids.int(), weights)


@pytest.mark.parametrize("mode", ["per-token", "bf16"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_right_layer_gives_no_alarm(mode, invariant, caplog):
    """Whatever T, whose finalize has another order for few tokens, and with slots of no expert."""
    canary, layers = Canary(1, rows=3), [experts(0, 144), experts(1, 144)]
    for n in range(9):
        x, (ids, weights) = call((1, 2, 5, 70)[n % 4], n, 144)
        ids[0, 0] = -1
        for layer in layers:
            options = {"activation": mode, "batch_invariant": invariant}
            got = canary.fused_moe(x, layer, (ids, weights), **options)
            assert torch.equal(got, fused_moe(x, layer, (ids, weights), **options))
        canary.wait()
    assert canary.counts.taken == canary.counts.inside == 10, canary.counts
    assert not canary.alarms and not caplog.records


def test_static_scales_are_judged_too():
    g = torch.Generator(device="cpu").manual_seed(0)
    w13 = torch.randn(E, 2 * INTERMEDIATE, H, generator=g, dtype=torch.float32, device="cpu")
    w2 = torch.randn(E, H, INTERMEDIATE, generator=g, dtype=torch.float32, device="cpu")
    layer = prepare_experts(w13.bfloat16(), w2.bfloat16(), input_amax=4.0, intermediate_amax=500.0)
    canary = Canary(1)
    for n in range(4):
        canary.fused_moe(*call(3, n)[:1], layer, call(3, n)[1])
        canary.wait()
    assert canary.counts.inside == 4


def test_a_wrong_kernel_is_caught_and_its_file_reproduces_it(tmp_path, caplog, capsys):
    layers = [experts(0), experts(1)]
    canary = Canary(5, folder=tmp_path)
    with own_backend.register(WRONG, "fused_moe"):
        for n in range(11):
            for number, layer in enumerate(layers):
                # It is wrong from the sixth step on, in the second layer alone.
                name = WRONG if n >= 5 and number == 1 else "reference"
                x, routing = call(4, n)
                canary.fused_moe(x, layer, routing, layer=f"model.{number}", backend=name)
            canary.wait()
    # The first step, both layers; then one layer every five steps, in turn.
    assert (canary.counts.taken, canary.counts.inside, canary.counts.outside) == (4, 3, 1)
    [alarm], [file] = canary.alarms, list(tmp_path.iterdir())
    assert alarm.layer == "model.1" and alarm.backend == WRONG
    [record] = caplog.records
    assert record.levelno == logging.ERROR and str(file) in record.getMessage()
    with torch.random.fork_rng():
        assert __main__.main(["replay", str(file), "--backend", WRONG]) == 1
        assert "outside" in capsys.readouterr().out
        assert __main__.main(["replay", str(file), "--backend", "reference"]) == 0


def test_samples_are_a_layer_every_n_steps_in_turn():
    canary, layers = Canary(3, rows=1), [experts(n) for n in range(2)]
    seen: list[list[int]] = []
    for n in range(13):
        before = [w.taken for w in canary._watches.values()] or [0, 0]
        for layer in layers:
            canary.fused_moe(*call(2, n)[:1], layer, call(2, n)[1])
        canary.wait()
        seen.append([w.taken - b for w, b in zip(canary._watches.values(), before, strict=True)])
    first, second, none = [1, 0], [0, 1], [0, 0]
    later = [none, none, second, none, none, first]
    assert seen == [[1, 1], *later, *later]
    assert canary.counts.inside == 6


def test_a_judge_that_is_behind_misses_samples_and_keeps_few():
    canary, layer = Canary(1), experts()
    with canary._judging:  # the thread waits
        for n in range(9):
            canary.fused_moe(*call(2, n)[:1], layer, call(2, n)[1])
    canary.wait()
    assert canary.counts.taken + canary.counts.missed == 9
    assert canary.counts.inside == canary.counts.taken <= 2


def test_new_weights_before_the_judge_are_no_alarm():
    layer, canary = experts(), Canary()
    with canary._judging:  # the thread waits
        x, routing = call(4, 0)
        canary.fused_moe(x, layer, routing)
        g = torch.Generator(device="cpu").manual_seed(9)
        w13 = torch.randn(E, 2 * INTERMEDIATE, H, generator=g, dtype=torch.float32, device="cpu")
        w2 = torch.randn(E, H, INTERMEDIATE, generator=g, dtype=torch.float32, device="cpu")
        layer.load_(w13.bfloat16(), w2.bfloat16())
    canary.wait()
    assert canary.counts.overtaken == 1 and canary.counts.outside == 0


def test_a_call_that_cannot_be_watched_is_said_once(caplog):
    from nvfp4_moe import Routing, RoutingMethodType

    canary, layer = Canary(), experts()
    logits = torch.randn(4, E, dtype=torch.float32, device="cpu")
    routing = logits, Routing(RoutingMethodType.Renormalize, K)
    for _ in range(2):
        canary.fused_moe(call(4, 0)[0], layer, routing)
    assert [r.getMessage() for r in caplog.records] == [
        "layer 0 is not watched: it routes from logits; give it ids and weights"
    ]


def test_weights_whose_writes_nobody_counts_are_not_watched(caplog):
    canary = Canary()
    with torch.inference_mode():
        layer = experts()
        canary.fused_moe(call(4, 0)[0], layer, call(4, 0)[1])
    canary.wait()
    assert canary.counts.taken == 0 and "made in inference mode" in caplog.text


def test_a_judge_that_raises_ends_nothing(monkeypatch, caplog):
    def broken(sample):
        raise MemoryError("none left")

    monkeypatch.setattr("nvfp4_moe.canary.canary.judge", broken)
    canary = Canary()
    canary.fused_moe(call(4, 0)[0], experts(), call(4, 0)[1])
    canary.wait()
    assert canary.counts.failed == 1 and "none left" in caplog.text


FATAL = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import test_canary as t
from nvfp4_moe.canary import from_environment
canary = from_environment()
x, routing = t.call(4, 0)
layer = t.experts()
with t.own_backend.register(t.WRONG, "fused_moe"):
    canary.fused_moe(x, layer, routing, backend=t.WRONG)
    canary.wait()
print("still here")
"""


def test_a_fatal_alarm_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4_MOE_CANARY", "100")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FATAL", "true")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FOLDER", str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", FATAL], capture_output=True, text=True)
    assert "wrong output: " in ran.stderr, ran.stderr
    assert len(list(tmp_path.iterdir())) == 1
    assert ran.returncode == 1 and "still here" not in ran.stdout


def test_the_environment_switches_it_on(monkeypatch):
    monkeypatch.delenv("NVFP4_MOE_CANARY", raising=False)
    assert from_environment() is None
    for value in ("", "0"):
        monkeypatch.setenv("NVFP4_MOE_CANARY", value)
        assert from_environment() is None
    for value in ("-1", "1.5", "on"):
        monkeypatch.setenv("NVFP4_MOE_CANARY", value)
        with pytest.raises(ValueError, match=r"NVFP4_MOE_CANARY is .*a number of steps"):
            from_environment()
    monkeypatch.setenv("NVFP4_MOE_CANARY", "250")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FOLDER", "somewhere")
    canary = from_environment()
    assert canary is not None and canary is from_environment()
    assert canary.every == 250 and str(canary.folder) == "somewhere" and not canary.fatal


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"every": 0}, "every is 0"), ({"rows": 0}, "rows is 0"), ({"fatal": 1}, "fatal is 1")],
)
def test_a_bad_argument_is_named(arguments, text):
    with pytest.raises((TypeError, ValueError), match=text):
        Canary(**arguments)


def test_statistics_are_refused():
    with pytest.raises(ValueError, match="stats is True"):
        Canary().fused_moe(call(4, 0)[0], experts(), call(4, 0)[1], stats=True)
