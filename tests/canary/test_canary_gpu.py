"""The canary on a GPU: rows of replays, a fault that begins between them, captures beside its thread."""

# SPDX-License-Identifier: Apache-2.0
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from nvfp4_moe import fused_moe, prepare_experts, register_backend
from nvfp4_moe.canary import Canary
from nvfp4_moe.canary.copies import beside
from nvfp4_moe.failures import replay
from nvfp4_moe.failures.replay_file import load
from nvfp4_moe.kernels.moe.backends import FUSED_MOE

pytestmark = pytest.mark.gpu

H, INTERMEDIATE, E, K = 256, 128, 8, 2


def experts(seed: int = 0):
    torch.manual_seed(seed)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    w13 = torch.randn(E, 2 * INTERMEDIATE, H, **options)
    return prepare_experts(w13, torch.randn(E, H, INTERMEDIATE, **options))


def call(tokens: int):
    x = torch.randn(tokens, H, dtype=torch.bfloat16, device="cuda")
    weights = torch.rand(tokens, K, dtype=torch.float32, device="cuda")
    ids = torch.rand(tokens, E, dtype=torch.float32, device="cuda").topk(K).indices
    return x, (ids.int(), weights)


def canary_of(*arguments, **options) -> Canary:
    """Its thread does not look at what replays copy: the tests do."""
    return Canary(*arguments, poll_seconds=1000.0, **options)


def captured(step):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph, output


def look(canary: Canary) -> None:
    torch.cuda.synchronize()
    canary.poll()


def renew(x, routing) -> None:
    """Other inputs in the same memory."""
    new_x, new_routing = call(len(x))
    for old, new in zip((x, *routing), (new_x, *new_routing), strict=True):
        old.copy_(new)


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("mode", ["per-token", "bf16"])
def test_replays_of_a_right_layer_give_no_alarm(tokens, mode):
    canary, layers = canary_of(2, rows=3, layers_per_graph=2), [experts(0), experts(1)]
    x, routing = call(tokens)

    def step():
        return [canary.fused_moe(x, e, routing, activation=mode) for e in layers]

    step()
    canary.wait()
    graph, outputs = captured(step)
    for n in range(20):
        renew(x, routing)
        graph.replay()
        if n % 4 == 3:
            for e, got in zip(layers, outputs, strict=True):
                assert torch.equal(got, fused_moe(x, e, routing, activation=mode))
        look(canary)
    canary.wait()
    # Two at the start; of replays the first two, then one layer every two steps.
    assert canary.counts.taken == canary.counts.inside == 2 + 2 + 9, canary.counts
    assert canary.counts.missed == 0


def test_a_fault_that_begins_between_replays_is_caught_and_replayed(tmp_path):
    flag = torch.zeros((), dtype=torch.bfloat16, device="cuda")

    def faulty(call):
        """Once the flag is set, the first product leaves out the last 64 columns of K."""
        states = call.activations.hidden_states
        part = slice(-32, None) if states.dtype == torch.uint8 else slice(-64, None)
        less = states.clone()
        less[:, part] = 0
        wrong = replace(call, activations=replace(call.activations, hidden_states=less))
        right, other = (FUSED_MOE.run("triton", c)[0] for c in (call, wrong))
        return torch.where(flag > 0, other, right)

    canary, layer = canary_of(4, folder=tmp_path), experts()
    x, routing = call(3)

    def step():
        return canary.fused_moe(x, layer, routing, backend="faulty")

    with register_backend("fused_moe", "faulty", faulty):
        step()
        canary.wait()
        graph, _ = captured(step)
        for n in range(9):
            flag.fill_(n >= 5)
            renew(x, routing)
            graph.replay()
            look(canary)
        canary.wait()
        assert (canary.counts.inside, canary.counts.outside) == (3, 1), canary.counts
        failing = load(next(tmp_path.iterdir()))
        assert failing.backend == "faulty" and "rows" in failing.case.name
        assert replay.replay(failing).differs
        flag.zero_()
        assert not replay.replay(failing).differs
    assert not replay.replay(failing, "triton").differs


def test_new_weights_between_replays_are_no_alarm():
    canary, layer = canary_of(1), experts()
    x, routing = call(3)

    def step():
        return canary.fused_moe(x, layer, routing)

    step()
    canary.wait()
    graph, _ = captured(step)
    for n in range(4):
        graph.replay()
        torch.cuda.synchronize()
        torch.manual_seed(n)
        options = {"device": "cuda", "dtype": torch.bfloat16}
        w13 = torch.randn(E, 2 * INTERMEDIATE, H, **options)
        layer.load_(w13, torch.randn(E, H, INTERMEDIATE, **options))
        look(canary)
        assert (canary.counts.overtaken, canary.counts.outside) == (n + 1, 0)
        graph.replay()
        look(canary)
    assert canary.counts.inside == 1 + 4


def test_graphs_watch_different_layers():
    canary, layers = canary_of(1, layers_per_graph=1), [experts(n) for n in range(3)]
    x, routing = call(2)

    def step():
        return [canary.fused_moe(x, e, routing) for e in layers]

    step()
    canary.wait()
    graphs = [captured(step)[0] for _ in layers]
    for n, graph in enumerate(graphs):
        graph.replay()
        look(canary)
        assert canary.counts.inside == 3 + n + 1
    assert [w.seen for w in canary._watches.values()] == [1, 1, 1]


def test_a_layer_is_not_kept_alive():
    canary, layers = canary_of(1), [experts()]
    x, routing = call(2)

    def step():
        return canary.fused_moe(x, layers[0], routing)

    step()
    canary.wait()
    graph, _ = captured(step)
    graph.replay()
    canary.wait()
    gone = weakref.ref(layers.pop())
    assert gone() is None and not canary._watches


def test_copies_of_another_thread_disturb_no_capture():
    layer, (x, routing) = experts(), call(8)
    fused_moe(x, layer, routing)
    stop, failures = threading.Event(), []

    def copy():
        try:
            while not stop.is_set():
                with beside(x.device):
                    layer.gemm1_weights[0].cpu()
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        for _ in range(20):
            graph, output = captured(lambda: fused_moe(x, layer, routing))
            graph.replay()
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert torch.equal(output, fused_moe(x, layer, routing))
