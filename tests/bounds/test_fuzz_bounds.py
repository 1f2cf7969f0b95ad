"""Random runs that keep the contract are inside the intervals; runs that do not are seen."""

# SPDX-License-Identifier: Apache-2.0
import shlex

import pytest
import torch

from nvfp4_moe.__main__ import main
from nvfp4_moe.cases.fuzz import Kind
from nvfp4_moe.cli import fuzz_bounds
from nvfp4_moe.differential import fuzz as fuzz_runs
from nvfp4_moe.reference.bounds.interval import Interval
from nvfp4_moe.reference.moe.layer import Stages
from nvfp4_moe.reference.numerics.accumulate import matmul

SETTINGS = {"tokens": 4, "ways": 3, "kinds": None, "device": "cpu", "triton": False}


def test_no_false_alarm():
    tally = fuzz_bounds.part(0, 1, 300, 1e9, SETTINGS)
    assert not tally.alarms, "\n".join(tally.alarms)
    assert sum(tally.runs.values()) >= 300
    assert tally.unknown < 0.06 * tally.values, "much is left open"
    assert tally.single > 0.5 * tally.values and tally.nan and tally.infinite


@pytest.mark.gpu
def test_no_false_alarm_on_a_gpu():
    """Triton's kernels and the reference. The kinds are few, so that they are soon compiled.

    `make fuzz-bounds-gpu` has many.
    """
    settings = {"tokens": 64, "ways": 2, "kinds": 5, "device": "cuda", "triton": True}
    tally = fuzz_bounds.part(0, 1, 200, 1e9, settings)
    assert not tally.alarms, "\n".join(tally.alarms)
    assert tally.runs["triton"] > 40


def test_the_kinds_are_all_drawn():
    kinds = [Kind.draw(seed) for seed in range(1000)]
    for name, values in (
        ("activation", 10),
        ("mode", 3),
        ("build", 3),
        ("recipe", 36),
        ("output_dtype", 3),
        ("finalize_order", 2),
    ):
        assert len({getattr(k, name) for k in kinds}) == values, name
    assert len({k.routing.method for k in kinds if k.routed}) == 10


@pytest.fixture
def finite(monkeypatch):
    """A reference whose rows are finite, whatever the contract says."""

    def rounded(rows):
        return rows.nan_to_num().bfloat16().nan_to_num()

    monkeypatch.setattr(fuzz_runs, "CONFORMING", {"fp64": Stages(round_rows=rounded)})
    monkeypatch.setattr(fuzz_runs, "_flushing", lambda: Stages(round_rows=rounded))


@pytest.mark.usefixtures("finite")
def test_finite_numbers_in_place_of_nan_and_infinity_are_seen():
    tally = fuzz_bounds.part(0, 1, 90, 1e9, SETTINGS)
    assert len(tally.alarms) > 5


def test_an_alarm_can_be_replayed(monkeypatch, capsys):
    """The command that is printed finds the alarm again, and nothing without the mistake."""
    wrong = Stages(gemm1=lambda x, w, _: matmul(x[:, 16:], w[:, 16:], "fp64"))
    monkeypatch.setitem(fuzz_runs.CONFORMING, "fp64", wrong)
    assert main(["fuzz-bounds", "--runs", "12"]) == 1
    again = shlex.split(capsys.readouterr().out.split("again: ")[1].splitlines()[0])
    again = again[again.index("fuzz-bounds") :]
    assert main(again) == 1
    assert f"FALSE ALARM seed {again[2]}, " in capsys.readouterr().out
    monkeypatch.undo()
    assert main(again) == 0


def test_nothing_judged_is_no_success(capsys):
    assert main(["fuzz-bounds", "--runs", "5", "--seconds", "0"]) == 3
    assert "fewer runs than the 5" in capsys.readouterr().out


def test_a_crash_is_an_alarm(monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("no")
        yield

    monkeypatch.setattr(fuzz_bounds, "judged", crash)
    tally = fuzz_bounds.part(0, 1, 1, 0.05, SETTINGS)
    assert tally.alarms[0].startswith("seed 0: RuntimeError in crash: no; again: ")


def test_the_tally_counts_what_intervals_say():
    inf, nan = torch.inf, torch.nan
    low, high = ([1.0, 1.0, nan, -inf, 5.0], [1.0, 2.0, nan, inf, inf])
    allowed = Interval(*(torch.tensor(t, dtype=torch.float64) for t in (low, high)))
    tally = fuzz_bounds.Tally()
    tally.add(
        7, "again", fuzz_runs.JudgedRun("a way", "output", torch.tensor([1.0, 3, 0, 0, 5]), allowed)
    )
    assert (tally.single, tally.infinite, tally.nan, tally.unknown, tally.widths) == (2, 1, 1, 1, 1)
    assert tally.outputs == 5 and "2 of 5 of output outside, first at (1,)" in tally.alarms[0]
