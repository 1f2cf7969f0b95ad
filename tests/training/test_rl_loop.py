"""The loop of `examples/rl_loop.py`, shortened: trainer and server agree to the bit, with bf16 not."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest
import torch
from paths import ROOT

_FILE = ROOT / "examples" / "rl_loop.py"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("rl_loop", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_trainer_and_server_agree_to_the_bit(demo, device):
    rows = demo.loop(demo.fake_quantized_layer, device, steps=20, rl_steps=4, every=8)
    assert [row.step for row in rows] == [0, 8, 16, 24]
    losses = [row.loss for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 2
    for row in rows:
        assert row.same_experts and row.differ == 0 and row.largest_ratio == row.kl == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_bf16_trainer_does_not(demo, device):
    rows = demo.loop(demo.bf16_layer, device, steps=9, rl_steps=0, every=8)
    for row in rows:
        assert row.same_experts and row.differ > 100_000
        assert row.largest_ratio > 0.05 and row.kl > 1e-4
