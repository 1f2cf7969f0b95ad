"""Our layer as a solution of FlashInfer's hook: the installed FlashInfer calls it and counts hits."""

# SPDX-License-Identifier: Apache-2.0
import json

import moe_cases
import pytest
import torch
from assertions import assert_bitwise, assert_inside
from moe_cases import Shape
from substitution_cases import GROUPS, SHAPE, call, ours, routed, write_solutions

import nvfp4_moe
from nvfp4_moe.__main__ import main
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, pack_topk, route
from nvfp4_moe.serving import substitution

GIVEN, FROM_LOGITS = (
    "flashinfer.fused_moe.core.trtllm_fp4_block_scale_routed_moe",
    "flashinfer.fused_moe.core.trtllm_fp4_block_scale_moe",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of one shape, by the command."""
    reason = "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')"
    pytest.importorskip("flashinfer", reason=reason)
    return write_solutions(tmp_path_factory.mktemp("solutions"))


@pytest.fixture
def hook(written, tmp_path, monkeypatch):
    """FlashInfer's hook with these solutions, by the environment as a server has it."""
    from flashinfer import trace_apply

    monkeypatch.setenv("HOME", str(tmp_path))  # where it writes the sources of solutions
    monkeypatch.setenv("FLASHINFER_TRACE_APPLY_PATH", str(written))
    if (
        not torch.cuda.is_available()
    ):  # it asks for each new name, and torch without CUDA cannot say
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert trace_apply.enable_apply() > 0
    yield trace_apply
    trace_apply.disable_apply()


@pytest.fixture
def fused(flashinfer, hook):
    from flashinfer import fused_moe

    return fused_moe


def test_from_logits(hook, fused):
    """FlashInfer's list of one, its output tensor, and a count of hits."""
    for changes in ({}, GROUPS, {"routing_method_type": 0}):
        given = call(**changes)
        (got,) = fused.trtllm_fp4_block_scale_moe(**given)
        assert_bitwise(got, ours(**given)[0], str(changes))
    given, output = call(), torch.full((5, 256), torch.nan, dtype=torch.bfloat16)
    (got,) = fused.trtllm_fp4_block_scale_moe(**given, output=output)
    assert got is output
    assert_bitwise(output, ours(**given)[0], "output")
    assert hook.stats() == {FROM_LOGITS: {"hit": 4}}


def test_given_routing(hook, fused):
    case = moe_cases.make(SHAPE)
    packed = pack_topk(case.ids, case.weights)
    for topk in (packed, (case.ids, case.weights.float() / 3)):
        given = routed(topk_ids=topk)
        want = nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**given, backend="reference")
        (got,) = fused.trtllm_fp4_block_scale_routed_moe(**given)
        assert_bitwise(got, want[0], "given")
    assert hook.stats() == {GIVEN: {"hit": 2}}


def test_without_finalize(hook, fused):
    """The hook drops do_finalize, and the solution reads it."""
    given = call(do_finalize=False)
    got, want = fused.trtllm_fp4_block_scale_moe(**given), ours(**given)
    assert len(got) == len(want) == 3
    for g, w in zip(got, want, strict=True):
        assert_bitwise(g, w, "do_finalize=False")


def test_arguments_that_the_hook_drops_are_kept(hook, fused):
    """Each changes the result, so that a solution of the definition's inputs alone would be wrong."""
    plain = ours(**call())[0]
    replay = torch.zeros(5, 2, dtype=torch.int16)
    (got,) = fused.trtllm_fp4_block_scale_moe(
        **call(valid_hidden_size=240, routing_replay_out=replay)
    )
    assert got.shape == (5, 240) and replay.any()
    assert_bitwise(got, plain[:, :240].contiguous(), "valid_hidden_size")


def test_what_cannot_be_right_is_an_error(hook, fused):
    case = moe_cases.make(SHAPE)
    given = routed(topk_ids=(case.ids, case.weights))
    delta = torch.zeros(5, 2, 128, dtype=torch.bfloat16)
    with pytest.raises(nvfp4_moe.UnsupportedError, match="gemm1_lora_delta"):
        fused.trtllm_fp4_block_scale_routed_moe(**given, gemm1_lora_delta=delta)
    mxfp4 = torch.ones(8, 128, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="gemm1_weights_scale is uint8"):
        fused.trtllm_fp4_block_scale_moe(**call(gemm1_weights_scale=mxfp4))
    assert {s: n for c in hook.stats().values() for s, n in c.items()} == {"error": 1}


def test_another_shape_stays_flashinfers(hook, fused):
    with pytest.raises(Exception) as raised:
        fused.trtllm_fp4_block_scale_moe(**call(Shape(5, 512, 64, 8, 2)))
    assert not isinstance(raised.value, nvfp4_moe.UnsupportedError)
    assert hook.stats() == {FROM_LOGITS: {"fallback_no_candidate": 1}}


def interval(given):
    """The outputs that keep the contract, of the call on a CPU."""
    case = moe_cases.make(SHAPE)
    names = ("n_group", "topk_group", "routed_scaling_factor")
    method = RoutingMethodType(given["routing_method_type"])
    routing = Routing(method, given["top_k"], **{name: given[name] for name in names})
    chosen = route(given["routing_logits"], routing)
    return fused_moe_bounds(
        case.activations, case.experts, chosen.ids, chosen.weights.bfloat16()
    ).output


def on_gpu(given):
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in given.items()}


@pytest.mark.gpu
def test_a_gpu_that_flashinfer_does_not_serve(hook, fused):
    """FlashInfer compiles this function for no such GPU; its hook calls ours, eagerly and in a graph."""
    compute_capability = torch.cuda.get_device_capability()
    if compute_capability[0] in (10, 12):
        pytest.skip(f"FlashInfer serves a GPU of compute capability {compute_capability}")
    from flashinfer.jit.core import current_compilation_context

    with pytest.raises(RuntimeError, match="No supported CUDA architectures found"):
        # As its generator of this layer asks (0.7.4, jit/fused_moe.py).
        current_compilation_context.get_nvcc_flags_list(supported_major_versions=[10, 12])
    for changes in ({}, GROUPS):
        given = on_gpu(call(**changes))
        output = torch.full((5, 256), torch.nan, dtype=torch.bfloat16, device="cuda")
        want = nvfp4_moe.trtllm_fp4_block_scale_moe(**given, backend="triton")[0]
        (got,) = fused.trtllm_fp4_block_scale_moe(**given, output=output)
        assert got is output
        assert_bitwise(got, want, str(changes))
        assert_inside(got.cpu(), interval(call(**changes)), str(changes))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = fused.trtllm_fp4_block_scale_moe(**given)
        captured.fill_(torch.nan)
        graph.replay()
        assert_bitwise(captured, want, f"{changes} in a graph")
    case = moe_cases.make(SHAPE)
    packed = pack_topk(case.ids, case.weights).cuda()
    given = on_gpu(routed(topk_ids=packed))
    want = nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**given, backend="triton")[0]
    (got,) = fused.trtllm_fp4_block_scale_routed_moe(**given)
    assert_bitwise(got, want, "given")
    print(torch.cuda.get_device_name(), hook.stats())
    assert hook.stats() == {FROM_LOGITS: {"hit": 4}, GIVEN: {"hit": 1}}


def test_a_hook_that_is_not_known_is_an_error():
    with pytest.raises(nvfp4_moe.UnsupportedError, match="holds no 'namespace'"):
        substitution._whole({"other": {}}, {})
    space = {"hidden_states": 1, "workspace_buffer": 2, "later": None}
    assert substitution._whole({"namespace": space}, {"hidden_states": 0}) == {"hidden_states": 1}
    with pytest.raises(nvfp4_moe.UnsupportedError, match="later is given"):
        substitution._whole({"namespace": space | {"later": 3}}, {"hidden_states": 0})


def test_flashinfer_bench_calls_it_by_the_inputs(written):
    """A solution is what FlashInfer's schema says, and returns the definition's one output."""
    from flashinfer.trace.solution import Solution

    files = {p.parent.name: p for p in written.rglob("nvfp4_moe.json")}
    assert {p.stem for p in (written / "definitions").rglob("*.json")} == set(files)
    name = "moe_fp4_block_scale_ds_routing_topk2_e8_h256_i64_act3_ng4_kg2"
    solution = Solution.from_dict(json.loads(files[name].read_text()))
    assert solution.definition == name
    space: dict = {}
    exec(solution.entry_source().content, space)
    definition = json.loads((written / "definitions/moe" / f"{name}.json").read_text())
    given = call(routing_method_type=2, n_group=4, topk_group=2)
    inputs = {n: given[n] for n in definition["inputs"] if given.get(n) is not None}
    got = space[solution.entry_symbol()](**inputs)
    assert_bitwise(got, ours(**given)[0], "by the inputs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "256,64,8"], "--shape is '256,64,8'; it must be H,I,E,K"),
        (["--shape", "200,64,8,2"], "H must be a multiple of 128 and I of 64"),
        (["--shape", "256,64,8,9"], "K and LOCAL from 1 to E"),
        (["--shape", "256,64,8,2", "--routing", "best"], "--routing has 'best'; it must be among"),
        (["--shape", "256,64,8,2", "--groups", "3,1"], "--groups is '3,1'; it must be N,TOP"),
        (["--shape", "256,64,8,2", "--activation", "Mish"], "--activation is 'Mish'; it must be"),
    ],
)
def test_bad_usage(arguments, message, tmp_path, capsys):
    assert main(["solutions", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_flashinfer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(version, "HERE", version.Installation(None))
    assert main(["solutions", str(tmp_path), "--shape", "256,64,8,2"]) == 2
    assert "which names the definitions" in capsys.readouterr().err
