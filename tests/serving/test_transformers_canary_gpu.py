"""The canary in a captured decode of transformers: the same tokens, and a fault that it sees."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers_decode import Decode, made, state

from nvfp4_moe import register_backend
from nvfp4_moe.canary import Canary
from nvfp4_moe.failures import replay
from nvfp4_moe.failures.replay_file import load
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.serving.transformers import register

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.gpu


@torch.no_grad()
def decoded(canary: Canary | None, steps: int, between=None) -> list[torch.Tensor]:
    """The logits of each step of a captured decode."""
    register(canary)
    decode = Decode(made("qwen3"))
    start = [(t, t.clone()) for t in state(decode)]
    decode.step()  # warms up
    if canary is not None:
        canary.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode.step()
    for tensor, value in start:
        tensor.copy_(value)
    found = []
    for n in range(steps):
        if between is not None:
            between(n)
        graph.replay()
        found.append(logits.clone())
        if canary is not None:
            torch.cuda.synchronize()
            canary.poll()
    if canary is not None:
        canary.wait()
    register()
    return found


def test_a_captured_decode_is_watched_and_has_the_same_bits():
    canary = Canary(5, poll_seconds=1000.0)
    got, want = decoded(canary, 20), decoded(None, 20)
    assert all(map(torch.equal, got, want))
    # The prompt, and the first replay of both layers; then a layer every five steps.
    assert canary.counts.taken == canary.counts.inside == 2 + 2 + 3, canary.counts


def test_a_fault_in_a_captured_decode_is_caught(tmp_path):
    flag = torch.ones((), dtype=torch.bfloat16, device="cuda")

    def faulty(call):
        return FUSED_MOE.run("triton", call)[0] * flag

    canary = Canary(5, poll_seconds=1000.0, folder=tmp_path)
    with register_backend("fused_moe", "faulty", faulty, before="triton"):
        decoded(canary, 12, lambda n: flag.fill_(1.25 if n > 6 else 1))
        assert canary.counts.outside == 1, canary.counts
        failing = load(next(tmp_path.iterdir()))
        assert failing.backend == "faulty"
        assert replay.replay(failing).differs
    assert not replay.replay(failing, "triton").differs
