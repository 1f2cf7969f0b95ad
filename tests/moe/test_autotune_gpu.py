"""Autotuning on a GPU, by its own clock."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise
from marks import ON_A_GPU
from moe_cases import Shape, make
from moe_triton_cases import to

import nvfp4_moe
from nvfp4_moe.kernels.gemm_config import GemmConfig
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.autotune import cache, search

pytestmark = ON_A_GPU


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    return tmp_path


@pytest.mark.parametrize("mode", ["per-token", "static", "bf16"])
@pytest.mark.parametrize("tokens", [3, 90, 1500])
def test_every_candidate_is_right(mode, tokens, folder, monkeypatch):
    """All that launch have the table's rows; the choice is the fastest, on disk, and what runs."""
    shape = Shape(tokens, 1024, 512, 8, 4)
    case = make(shape, mode=mode)
    experts, x = to("cuda", case.experts), case.x.cuda()
    routing = (case.ids.cuda(), case.weights.cuda())
    options = {"activation": mode, "backend": "triton", "fast_math": True, "nvfp4_4over6": None}
    before = nvfp4_moe.fused_moe(x, experts, routing, **options)
    invariant = nvfp4_moe.fused_moe(x, experts, routing, batch_invariant=True, **options)

    (tuned,) = nvfp4_moe.autotune_fused_moe(experts, tokens, 4, activation=mode)
    print(tuned)
    assert [m for m in tuned.measured if "differs" in m.dropped] == []
    ran = [m for m in tuned.measured if m.us is not None]
    assert {m.config for m in ran} >= set(tuned.table) and len(ran) >= len(tuned.measured) / 2
    assert all(m.us > 0 for m in ran) and 0 < tuned.chosen_us <= tuned.table_us
    assert [tuned.file] == list(folder.rglob("*.json"))

    cache._known.clear()  # as in another process
    launched = []
    launch_gemm = launch._launch_gemm

    def spy(*args):
        launched.extend(a for a in args if isinstance(a, GemmConfig))
        launch_gemm(*args)

    monkeypatch.setattr(launch, "_launch_gemm", spy)
    after = nvfp4_moe.fused_moe(x, experts, routing, **options)
    assert launched == list(tuned.chosen)
    error = (after.double() - before.double()).norm() / before.double().norm()
    assert error < 5e-3  # another order of sums may move a code of the intermediate
    again = nvfp4_moe.fused_moe(x, experts, routing, batch_invariant=True, **options)
    assert_bitwise(again, invariant, "batch-invariant, after tuning")


def test_the_entry_is_read_while_a_graph_is_captured():
    """The first look-up of all happens in the capture; the kernels were compiled before it."""
    case = make(Shape(17, 256, 128, 8, 2))
    experts, x = to("cuda", case.experts), case.x.cuda()
    routing = (case.ids.cuda(), case.weights.cuda())
    key = cache.key_of(experts, 34, 2, "per-token")
    cache.store(key, (GemmConfig(128, 32, 64, 3, 4), GemmConfig(64, 32, 64, 3, 4)))

    def call():
        return nvfp4_moe.fused_moe(x, experts, routing, backend="triton")

    want = call()
    torch.cuda.synchronize()
    cache._known.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    assert cache._known[key][0].bk == 64
    graph.replay()
    assert_bitwise(captured, want, "replayed")


def test_a_kernel_that_writes_nothing_is_dropped(monkeypatch):
    """Right rows of the candidate before may still lie in the memory."""
    launch_gemm = launch._launch_gemm
    idle = GemmConfig(64, 32, 128, 4, 4)
    monkeypatch.setattr(search, "candidates", lambda table, *_, **__: [table, idle])
    monkeypatch.setattr(launch, "_launch_gemm", lambda *a: None if idle in a else launch_gemm(*a))
    experts = to("cuda", make(Shape(1, 1024, 512, 8, 4)).experts)
    (tuned,) = nvfp4_moe.autotune_fused_moe(experts, 8, 4)
    assert [bool(m.dropped) for m in tuned.measured] == [False, True] * 2
