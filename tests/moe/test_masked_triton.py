"""The Triton kernels on masked input against the reference: in the interpreter, and on a GPU."""

# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import masked_cases
import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape
from moe_triton_cases import CONFIGS, SMALL, to
from mutants.generated.strict import codes_multiplied
from paths import ROOT, SUPPORT

import nvfp4_moe
from nvfp4_moe import ActivationType
from nvfp4_moe.kernels.moe.masked import launch
from nvfp4_moe.kernels.tiles import GemmConfig

WITH_MPROTECT = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf and NaN


@pytest.mark.parametrize("case", masked_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, device):
    case(device, SMALL if device == "cpu" else CONFIGS[0])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
@pytest.mark.parametrize(
    "case", [masked_cases.exact_sums, masked_cases.the_rows_of_the_layer], ids=lambda f: f.__name__
)
def test_every_shipped_tile(case, config):
    case("cuda", config)


@pytest.mark.interpreter
def test_codes_multiplied_as_they_are():
    """The path of GPUs with a block-scaled MMA, with that instruction spelled out."""
    with codes_multiplied():
        masked_cases.the_rows_of_the_layer("cpu", GemmConfig(128, 16, 128, 1, 4))


@pytest.mark.interpreter
def test_weights_decoded_before_and_tiles_half_as_wide():
    for config in (GemmConfig(128, 16, 64, 1, 4, decoded=True), GemmConfig(128, 32, 64, 1, 4)):
        masked_cases.exact_sums("cpu", config)


def absent(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SUPPORT / "masked_absent.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@WITH_MPROTECT
@pytest.mark.interpreter
def test_rows_at_addresses_that_do_not_exist():
    """A process of its own, which a read beyond `masked_m` would end with a signal."""
    done = absent()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["quantizer", "bf16", "codes"]


@WITH_MPROTECT
@pytest.mark.interpreter
def test_a_read_at_such_an_address_ends_the_process():
    """The test above can fail."""
    assert absent("read").returncode < 0


@pytest.mark.gpu
def test_every_row_of_the_output_is_written(unwritten_memory_is_nan):
    masked_cases.exact_sums("cuda", CONFIGS[0])
    masked_cases.quantizer("cuda")


@pytest.mark.gpu
def test_cuda_graph_with_other_counts():
    """Captured with few rows, replayed with many and with none: what the call itself gives."""
    most = torch.tensor([7, 0, 33, 64])
    case = moe_cases.make(Shape(int(most.sum()), 256, 128, 4, 1))
    x = masked_cases.spread(case.x, most, 64).cuda()
    masked = torch.tensor([1, 0, 2, 0], dtype=torch.int32, device="cuda")
    experts = to("cuda", case.experts)

    def call():
        return nvfp4_moe.fused_moe_masked(x, masked, experts, expected_m=16, backend="triton")

    call()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for counts in (most, torch.zeros(4, dtype=torch.int64), torch.tensor([3, 0, 20, 64])):
        masked.copy_(counts)
        graph.replay()
        assert_bitwise(captured, call(), f"replayed with {counts.tolist()}")
        live = torch.arange(64) < counts[:, None]
        assert bool(captured.cpu()[live].isfinite().all()) and not captured.cpu()[~live].any()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    counts = torch.tensor(masked_cases.MASKED[0])
    case = masked_cases.exact(counts, ActivationType.Relu2)
    call = to("cuda", masked_cases.call_of(case, counts, masked_cases.MOST))
    x, scales = torch.ones(4, 5, 64, device="cuda").bfloat16(), torch.ones(4, device="cuda")

    def calls():
        launch.OP(call)
        nvfp4_moe.nvfp4_quantize_masked(x, call.masked_m, scales, backend="triton")

    calls()  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend):
    masked = torch.tensor(masked_cases.MASKED[0])
    case = masked_cases.exact(masked, ActivationType.Relu2)
    a = case.activations
    parts = (a.hidden_states, a.block_scales, a.per_token_scale)
    x, scales, token = (masked_cases.spread(t, masked, masked_cases.MOST) for t in parts)

    def call(x, scales, token, masked):
        return nvfp4_moe.fused_moe_masked(
            x, masked, case.experts, hidden_states_scale=scales, per_token_scale=token,
            backend=backend,
        )  # fmt: skip

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, scales, token, masked), call(x, scales, token, masked))
