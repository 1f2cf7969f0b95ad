"""The doors of the fused mixture of experts: arguments, backends, reasons."""

# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import fields, is_dataclass, replace

import moe_cases
import pytest
import torch
import triton
from assertions import assert_bitwise
from installations import pretend
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe.kernels.backends import log_fallback
from nvfp4_moe.kernels.flashinfer import trtllm, version
from nvfp4_moe.kernels.moe import backends as moe_backends
from nvfp4_moe.kernels.moe import ops as moe_ops
from nvfp4_moe.kernels.moe import routing as triton_routing
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.moe.call import KernelCall, make_moe_call
from nvfp4_moe.kernels.moe.hopper import config as hopper_config
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe import layer as reference
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, pack_topk, route
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

SHAPE = Shape(5, 128, 64, 8, 2)
DEEPSEEK = Routing(RoutingMethodType.DeepSeekV3, 2, 4, 2, 2.5)


def logits_of(shape=SHAPE):
    return torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(8))


def keywords(case, shape=SHAPE, **changes):
    """Everything both doors share, in FlashInfer's names."""
    a, e = case.activations, case.experts
    given = {name: getattr(e, name) for name in (
        "gemm1_weights", "gemm1_weights_scale", "gemm1_bias", "gemm1_alpha", "gemm1_beta",
        "gemm1_clamp_limit", "gemm2_weights", "gemm2_weights_scale", "gemm2_bias",
        "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar",
    )}  # fmt: skip
    scales = a.block_scales
    return (
        given
        | {
            "hidden_states": a.hidden_states,
            "hidden_states_scale": None if scales is None else scales.view(torch.float8_e4m3fn),
            "per_token_scale": a.per_token_scale,
            "routing_bias": None,
            "num_experts": shape.experts,
            "top_k": shape.top_k,
            "n_group": None,
            "topk_group": None,
            "intermediate_size": e.padded_intermediate_size,
            "local_expert_offset": shape.offset,
            "local_num_experts": e.num_local,
            "routed_scaling_factor": None,
            "activation_type": int(e.activation),
        }
        | changes
    )


def from_logits(case, **changes):
    given = {"routing_logits": logits_of(), "routing_method_type": 1} | changes
    return nvfp4_moe.trtllm_fp4_block_scale_moe(**keywords(case, **given))


def routed(case, topk, **changes):
    return nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**keywords(case, topk_ids=topk, **changes))


@pytest.mark.parametrize(
    "name", ["trtllm_fp4_block_scale_moe", "trtllm_fp4_block_scale_routed_moe"]
)
def test_signatures_are_flashinfers(name):
    theirs = pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
    every = inspect.signature(getattr(theirs, name)).parameters
    since_new = {
        a.name
        for f in (trtllm.FROM_LOGITS, trtllm.ROUTED)
        for a in f.arguments
        if a.versions == version.SINCE_NEW
    }
    want = {n: p for n, p in every.items() if n not in since_new}
    have = inspect.signature(getattr(nvfp4_moe, name)).parameters
    assert list(have)[: len(want)] == list(want)
    for p in want.values():
        assert have[p.name].default == p.default or p.default is inspect.Parameter.empty
    added = [have[n] for n in list(have)[len(want) :]]
    assert added and all(p.kind == p.KEYWORD_ONLY for p in added)


@pytest.mark.parametrize(
    "routing", [Routing(m, 1 if m == 3 else 2) for m in range(10)] + [DEEPSEEK], ids=str
)
def test_from_logits(routing):
    case = moe_cases.make(SHAPE)
    (got,) = from_logits(
        case,
        routing_method_type=int(routing.method),
        top_k=routing.top_k,
        n_group=routing.n_group,
        topk_group=routing.topk_group,
        routed_scaling_factor=routing.routed_scaling_factor,
    )
    r = route(logits_of(), routing)
    want = reference.fused_moe(case.activations, case.experts, r.ids, r.weights_bf16)
    assert_bitwise(got, want.output, str(routing))


def test_routed_takes_packed_ids_and_tuples():
    case = moe_cases.make(SHAPE)
    want = reference.fused_moe(case.activations, case.experts, case.ids, case.weights).output
    packed = pack_topk(case.ids, case.weights)
    assert_bitwise(routed(case, packed)[0], want, "packed")
    assert_bitwise(routed(case, (case.ids, case.weights))[0], want, "tuple")
    exact = torch.rand(case.weights.shape, generator=torch.Generator().manual_seed(1))
    want = reference.fused_moe(case.activations, case.experts, case.ids, exact).output
    assert_bitwise(routed(case, (case.ids, exact))[0], want, "fp32 weights are not rounded")


def test_without_finalize():
    shape = Shape(5, 128, 64, 8, 2, 3, 4)
    case = moe_cases.make(shape)
    rows, weights, permuted = nvfp4_moe.trtllm_fp4_block_scale_routed_moe(
        **keywords(case, shape, topk_ids=(case.ids, case.weights), do_finalize=False)
    )
    want = reference.fused_moe(
        case.activations, case.experts, case.ids, case.weights, local_expert_offset=3
    )
    here = ((case.ids >= 3) & (case.ids < 7)).flatten()
    assert_bitwise(weights, case.weights, "weights")
    assert torch.equal(permuted >= 0, here)
    assert permuted[here].unique().numel() == here.sum()
    assert_bitwise(rows[permuted[here].long()], want.rows.flatten(0, 1)[here], "rows")


def test_output_and_replay_are_written():
    case = moe_cases.make(SHAPE)
    out = torch.full((5, 128), torch.nan, dtype=torch.bfloat16)
    replay = torch.full((9, 2), -7, dtype=torch.int16)
    (got,) = from_logits(case, output=out, routing_replay_out=replay)
    assert got is out and not out.isnan().any()
    ids = route(logits_of(), Routing(RoutingMethodType.Renormalize, 2)).ids
    assert torch.equal(replay[:5].int(), ids) and (replay[5:] == -7).all()


WITH_SHARED = {
    "routing_method_type": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_fused_shared_experts": 2,
    "local_num_experts": 8,
}


def test_shared_experts():
    """Every token also goes to the experts after the routed ones, with weight 1."""
    case = moe_cases.make(Shape(5, 128, 64, 10, 2))
    logits = logits_of()
    given = keywords(case, routing_logits=logits, **WITH_SHARED)
    (got,) = nvfp4_moe.trtllm_fp4_block_scale_moe(**given)
    r = route(logits, DEEPSEEK)
    ids = torch.cat([r.ids, torch.tensor([[8, 9]] * 5, dtype=torch.int32)], 1)
    weights = torch.cat([r.weights_bf16, torch.ones(5, 2).bfloat16()], 1)
    want = reference.fused_moe(case.activations, case.experts, ids, weights)
    assert_bitwise(got, want.output, "shared experts")


@pytest.mark.interpreter
def test_shared_experts_where_triton_routes():
    case = moe_cases.make(Shape(5, 128, 64, 10, 2))
    given = keywords(case, routing_logits=logits_of(), do_finalize=False, **WITH_SHARED)
    _, weights, permuted = nvfp4_moe.trtllm_fp4_block_scale_moe(**given, backend="triton")
    want = torch.cat([route(logits_of(), DEEPSEEK).weights_bf16, torch.ones(5, 2).bfloat16()], 1)
    assert_bitwise(weights, want, "weights")
    assert permuted.shape == (5 * 4,) and (permuted >= 0).all()


def test_recipe_of_the_intermediate(monkeypatch):
    case = moe_cases.make(Shape(64, 128, 128, 8, 2))
    topk = (case.ids, case.weights)
    four = NVFP44Over6Config(256)
    wants = {
        recipe: reference.fused_moe(case.activations, case.experts, *topk, recipe=recipe).output
        for recipe in (Recipe(), Recipe("exact"), Recipe("fast", four))
    }
    assert len({w.view(torch.int16).sum().item() for w in wants.values()}) == 3
    assert_bitwise(routed(case, topk)[0], wants[Recipe()], "default")
    assert_bitwise(routed(case, topk, fast_math=False)[0], wants[Recipe("exact")], "exact")
    got = routed(case, topk, nvfp4_4over6=four)[0]
    assert_bitwise(got, wants[Recipe("fast", four)], "4over6")
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    assert_bitwise(routed(case, topk)[0], wants[Recipe("exact")], "exact by the environment")
    assert_bitwise(routed(case, topk, fast_math=True)[0], wants[Recipe()], "fast by argument")


@pytest.mark.parametrize("activation", ["per-token", "static", "bf16"])
def test_the_friendly_door(activation):
    case = moe_cases.make(Shape(5, 144, 80, 8, 2), mode=activation)
    got = nvfp4_moe.fused_moe(case.x, case.experts, (case.ids, case.weights), activation=activation)
    want = reference.fused_moe(case.activations, case.experts, case.ids, case.weights).output
    assert_bitwise(got, want, activation)
    assert got.shape == (5, 144)


def test_the_friendly_door_from_logits():
    case = moe_cases.make(SHAPE)
    routing = Routing(RoutingMethodType.Renormalize, 2)
    got = nvfp4_moe.fused_moe(case.x, case.experts, (logits_of(), routing))
    assert_bitwise(got, from_logits(case)[0], "both doors")


def test_compiles_into_one_graph():
    case = moe_cases.make(SHAPE)

    def call(x):
        return nvfp4_moe.fused_moe(x, case.experts, (case.ids, case.weights), fast_math=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(case.x), call(case.x), "compiled")


def test_opcheck():
    case = moe_cases.make(SHAPE)
    # opcheck cannot compare float8 tensors; the op reads their bytes.
    scales = {
        name: getattr(case.experts, name).view(torch.uint8)
        for name in ("gemm1_weights_scale", "gemm2_weights_scale")
    }
    experts = replace(case.experts, **scales)
    for do_finalize in (True, False):
        call = KernelCall(
            case.activations, experts, 8, do_finalize=do_finalize, output_dtype=torch.float16
        )
        flat = moe_ops.FLAT.flatten(call)
        torch.library.opcheck(
            torch.ops.nvfp4_moe.reference_fused_moe, (*flat, case.ids, case.weights)
        )


def test_a_call_crosses_and_comes_back():
    """Every field that kernels read, with a value of its own."""
    case = moe_cases.make(SHAPE)
    call = KernelCall(
        case.activations, replace(case.experts, gemm1_alpha=torch.ones(8)), 12, 4, 3,
        Recipe("exact", NVFP44Over6Config(256)), False, "slot", True, torch.float32, "per-token",
    )  # fmt: skip
    flat = moe_ops.FLAT.flatten(call)
    assert len(flat) == len(moe_ops.FLAT.names) == len(set(moe_ops.FLAT.names))
    assert all(isinstance(v, torch.Tensor | torch.dtype | int | str | None) for v in flat)
    back = moe_ops.FLAT.build(flat)
    for f in fields(KernelCall):
        a, b = getattr(call, f.name), getattr(back, f.name)
        if not is_dataclass(a) or isinstance(a, Recipe):
            assert a == b and a != f.default, f.name
            continue
        for g in fields(a):
            assert getattr(a, g.name) is getattr(b, g.name), g.name


def test_output_dtypes():
    """Rounded once, from the fp32 sum over slots; into the caller's tensor, too."""
    case = moe_cases.make(SHAPE)
    routing = (case.ids, case.weights)
    exact = nvfp4_moe.fused_moe(case.x, case.experts, routing, output_dtype=torch.float32)
    assert (exact != exact.bfloat16()).any()
    for dtype in (torch.bfloat16, torch.float16):
        got = nvfp4_moe.fused_moe(case.x, case.experts, routing, output_dtype=dtype)
        assert_bitwise(got, exact.to(dtype), str(dtype))
        into = torch.empty_like(got)
        given = keywords(case, topk_ids=routing, output=into)
        (output,) = nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**given)
        assert output is into
        assert_bitwise(into, got, f"into {dtype}")
    with pytest.raises(ValueError, match="output_dtype is torch\\.int8"):
        nvfp4_moe.fused_moe(case.x, case.experts, routing, output_dtype=torch.int8)


CAPABLE = {"capability": (10, 0)}
SERVED = replace(SHAPE, hidden=256, intermediate=128)
"""A shape that FlashInfer's TRT-LLM layer has kernels for."""


def explained(case=None, **changes):
    case = case or moe_cases.make(SERVED)
    given = {"routing": (case.ids, case.weights)} | CAPABLE | changes
    return nvfp4_moe.explain_fused_moe(case.x, case.experts, **given)


@pytest.fixture
def without_flashinfers_environment(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.delenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", raising=False)


@pytest.mark.usefixtures("without_flashinfers_environment")
class TestExplain:
    def test_flashinfer_serves(self):
        e = explained()
        assert e.backend == "flashinfer:trtllm" and e.reason("triton") is None

    @pytest.mark.parametrize(
        "changes,reason",
        [
            ({"capability": (9, 0)}, "sm_90 has no kernels"),
            ({"capability": (12, 0)}, "sm_120 has no kernels"),
            ({"fast_math": False}, "set FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1"),
            ({"nvfp4_4over6": NVFP44Over6Config()}, "FLASHINFER_NVFP4_4OVER6"),
            ({"build": "cute-dsl"}, 'build="cuda"'),
            ({"finalize_order": "slot"}, "finalize_order"),
            ({"output_dtype": torch.float16}, "the output is torch.float16"),
            ({"batch_invariant": True}, "batch_invariant"),
            ({"activation": "bf16"}, "hidden_states are bf16"),
        ],
    )
    def test_flashinfer_refuses(self, changes, reason):
        e = explained(**changes)
        assert e.backend == "triton" and reason in e.reason("flashinfer:trtllm")

    @pytest.mark.parametrize("version_", [version.CITED, version.NEW])
    @pytest.mark.parametrize("mode", ["per-token", "static"])
    @pytest.mark.parametrize(
        ("hidden", "padded", "serves"),
        [
            (128, 128, False),
            (240, 256, True),
            (384, 384, False),
            (2880, 2944, False),
            (512, 512, True),
        ],
    )
    def test_a_hidden_size_of_whole_tiles(
        self, monkeypatch, hidden, padded, serves, mode, version_
    ):
        """Both versions have the same kernels, which read K of the first GEMM in tiles of 256."""
        pretend(monkeypatch, version=version_)
        case = moe_cases.make(Shape(2, hidden, 128, 2, 1), mode=mode)
        e = explained(case, activation=mode)
        reason = e.reason("flashinfer:trtllm")
        assert e.backend == ("flashinfer:trtllm" if serves else "triton")
        assert serves or f"hidden_size is {padded}, padded; it must be a multiple of 256" in reason

    def test_more_refusals(self, monkeypatch):
        shape = replace(SERVED, tokens=0)
        assert "no tokens" in explained(moe_cases.make(shape)).reason("flashinfer:trtllm")
        case = moe_cases.make(SERVED, ActivationType.GegluTanh)
        assert "GegluTanh has no kernels" in explained(case).reason("flashinfer:trtllm")
        case = moe_cases.make(SERVED, ActivationType.Situ)
        reason = explained(case, capability=(10, 7)).reason("flashinfer:trtllm")
        assert "Situ has no kernels on sm_107" in reason
        routing = (torch.zeros(5, 300), Routing(RoutingMethodType.Default, 2))
        assert "256 experts" in explained(routing=routing).reason("flashinfer:trtllm")
        case = moe_cases.make(SERVED)
        given = explained(num_experts=3000).reason("flashinfer:trtllm")
        assert "2048 experts" in given
        pretend(monkeypatch, version=(0, 6, 18))
        assert "older than 0.7" in explained(case).reason("flashinfer:trtllm")
        pretend(monkeypatch, version=None)
        assert "not installed" in explained(case).reason("flashinfer:trtllm")

    def test_llama4_over_ranks_with_few_tokens(self):
        """FlashInfer's kernel for up to three tokens has global experts in its map of tiles."""
        for tokens, experts, refused in ((3, 16, True), (4, 16, False), (3, 8, False)):
            case = moe_cases.make(replace(SERVED, tokens=tokens))
            given = torch.zeros(tokens, experts), Routing(RoutingMethodType.Llama4, 1)
            e = explained(case, routing=given, num_experts=experts)
            assert (e.backend == "triton") == refused
            assert ("wrong experts" in (e.reason("flashinfer:trtllm") or "")) == refused

    def test_routing_by_the_functions_of_another_gpu(self):
        routing = Routing(RoutingMethodType.Default, 2, functions="hopper")
        e = explained(routing=(torch.zeros(5, 8), routing))
        assert e.backend == "triton" and "functions='hopper'" in e.reason("flashinfer:trtllm")

    def test_routing_by_functions_that_are_not_the_gpus(self, monkeypatch, caplog):
        """Triton's layer then routes by the reference, says so, and names what differs."""
        hopper = Routing(RoutingMethodType.Sigmoid, 2, functions="hopper")
        logits, gpu = logits_of(), torch.device("cuda")
        note, gemm = explained(routing=(logits, hopper), capability=(9, 0)).notes
        assert "GEMM for sm_90" in gemm
        assert note.startswith(
            "triton's layer routes by the reference, to the same bits: functions="
        )
        for wrong, reason in ((0, None), (7, "whose instructions differ for 7 arguments")):
            monkeypatch.setattr(triton_routing, "functions_that_differ", lambda _, n=wrong: n)
            said = triton_routing.refusal(hopper, gpu)
            assert said is reason is None or reason in said
        assert triton_routing.refusal(replace(hopper, functions="exact"), gpu) is None
        case = moe_cases.make(SHAPE)
        call = make_moe_call(
            case.activations, case.experts, num_experts=8, routing=hopper, logits=logits
        )
        log_fallback.cache_clear()
        with caplog.at_level("INFO", logger="nvfp4_moe"):
            ids, weights = call.routed("triton")
        want = route(logits, hopper)
        assert torch.equal(ids, want.ids) and torch.equal(weights, want.weights_bf16)
        (line,) = caplog.messages
        assert line.startswith("the routing: triton cannot serve, falling back: functions='hopper'")

    def test_what_flashinfer_leaves_open_is_noted(self):
        case = moe_cases.make(SERVED)
        (note,) = explained(case).notes
        assert "one of two equal ids" in note
        many = moe_cases.make(replace(SERVED, tokens=17))
        assert not explained(many).notes and not explained(case, build="cute-dsl").notes
        (note,) = explained(case, capability=(9, 0)).notes
        assert "one of two equal ids" not in note
        logits = torch.zeros(SERVED.tokens, SERVED.experts)
        groups = Routing(RoutingMethodType.DeepSeekV3, 2, 2, 1)
        (note,) = explained(case, routing=(logits, groups)).notes
        assert "topk_group" in note
        (note,) = explained(case, routing=(logits, Routing(RoutingMethodType.TopK, 2))).notes
        assert "no experts" in note
        sigmoid = Routing(RoutingMethodType.Sigmoid, 2)
        assert not explained(case, routing=(logits, sigmoid)).notes

    def test_which_gemm_multiplies_on_hopper_is_noted(self, monkeypatch):
        case = moe_cases.make(replace(SHAPE, tokens=17))
        assert not explained(case).notes and not explained(case, capability=(8, 9)).notes
        (note,) = explained(case, capability=(9, 0)).notes
        assert "GEMM for sm_90" in note and "batch_invariant=False, too" in note
        few = moe_cases.make(replace(SHAPE, tokens=16), mode="bf16")
        (fewer,) = explained(few, capability=(9, 0)).notes
        assert fewer.startswith(note) and fewer.endswith("in one launch")
        moved = torch.zeros(case.experts.gemm1_weights.numel() + 8, dtype=torch.uint8)[8:]
        weights = moved.view_as(case.experts.gemm1_weights)
        experts = replace(case.experts, gemm1_weights=weights)
        (note,) = explained(replace(case, experts=experts), capability=(9, 0)).notes
        assert "not by that for sm_90" in note and "multiple of 16 bytes" in note
        monkeypatch.setattr(triton, "__version__", "3.99.0")
        monkeypatch.setattr(hopper_config, "triton_version", lambda: (3, 99))
        (note,) = explained(case, capability=(9, 0)).notes
        assert "not by that for sm_90" in note and "Triton is 3.99.0" in note

    def test_static_scales(self):
        case = moe_cases.make(SERVED, mode="static")
        assert explained(case, activation="static").backend == "flashinfer:trtllm"
        assert explained(case, activation="static", capability=(9, 0)).backend == "triton"

    def test_an_old_gpu_and_a_cpu(self):
        assert explained(capability=(7, 5)).backend == "reference"
        e = explained(capability=None)
        assert e.backend == "reference" and "on the CPU" in e.reason("flashinfer:trtllm")

    def test_an_invalid_call_is_explained(self):
        e = explained(activation="fp8")
        assert e.backend is None and "activation is 'fp8'" in e.reason("triton")

    def test_named(self):
        assert explained(backend="reference").backend == "reference"
        assert explained(backend="flashinfer:trtllm", capability=(9, 0)).backend is None


def serve_trtllm_by(monkeypatch, run):
    """Let a function run TRT-LLM's layer, which refuses nothing but shapes without a kernel."""
    layer = replace(trtllm.LAYER, rules=trtllm.RULES[-1:], run=run)
    monkeypatch.setitem(FUSED_MOE._table, layer.name, moe_backends.on_flashinfer(layer))


def test_a_missing_kernel_falls_back_once(monkeypatch, caplog):
    """It shows at run time only: the next call of the shape does not try again, and says why."""
    case = moe_cases.make(SHAPE)
    monkeypatch.setattr(trtllm, "_without_kernel", {})
    calls = []

    def run(request):
        calls.append(request)
        raise RuntimeError("No kernel found for the given options: e2m1\nmore")

    serve_trtllm_by(monkeypatch, run)
    want = reference.fused_moe(case.activations, case.experts, case.ids, case.weights).output
    for _ in range(2):
        assert_bitwise(routed(case, (case.ids, case.weights))[0], want, "the reference's")
    assert len(calls) == 1
    assert "had no kernel, falling back" in caplog.text
    reason = FUSED_MOE.refusal("flashinfer:trtllm", calls[0])
    assert reason == "it had no kernel for this shape: No kernel found for the given options: e2m1"
    with pytest.raises(nvfp4_moe.UnsupportedError, match="no kernel for this shape"):
        routed(case, (case.ids, case.weights), backend="flashinfer:trtllm")

    def other(request):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trtllm, "_without_kernel", {})
    serve_trtllm_by(monkeypatch, other)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        routed(case, (case.ids, case.weights))


def test_a_named_backend_never_falls_back():
    case = moe_cases.make(SHAPE)
    with pytest.raises(nvfp4_moe.UnsupportedError, match="flashinfer:trtllm cannot serve"):
        routed(case, (case.ids, case.weights), backend="flashinfer:trtllm")
    with pytest.raises(ValueError, match="backend is 'cutlass'; it must be one of auto"):
        routed(case, (case.ids, case.weights), backend="cutlass")


def test_nobody_can_serve_lora_here():
    case = moe_cases.make(SHAPE)
    with pytest.raises(nvfp4_moe.UnsupportedError, match="gemm1_lora_delta is FlashInfer's alone"):
        routed(case, (case.ids, case.weights), gemm1_lora_delta=torch.zeros(5, 2, 128))


WRONG = [
    ("hidden_states", lambda t: t.float(), "hidden_states is float32"),
    ("hidden_states", lambda t: t[:, :32], "hidden_states is uint8 .* of uint8 \\[5, 64\\]"),
    ("hidden_states_scale", lambda t: None, "hidden_states_scale is None"),
    ("hidden_states_scale", lambda t: t[:2], "hidden_states_scale is .*\\[5, 8\\], linear"),
    ("hidden_states_scale", lambda t: t.T, "hidden_states_scale has strides .*contiguous"),
    ("gemm1_weights", lambda t: t.to(torch.int32), "gemm1_weights is int32"),
    ("gemm1_weights", lambda t: t[:, :100], "rows, and H = 128, must be multiples of 128"),
    ("gemm1_weights", lambda t: t[0], "gemm1_weights is uint8 \\[128, 64\\]"),
    ("gemm1_weights_scale", lambda t: t.view(torch.uint8), "gemm1_weights_scale is uint8"),
    (
        "gemm2_weights",
        lambda t: t.transpose(1, 2),
        "intermediate_size is 64; it must be 256, which gemm2_weights hold",
    ),
    ("gemm2_weights_scale", lambda t: t[:, :5], "gemm2_weights_scale is float8_e4m3fn"),
    ("output1_scale_scalar", lambda t: None, "output1_scale_scalar is None"),
    ("output1_scale_gate_scalar", lambda t: t.half(), "output1_scale_gate_scalar is float16"),
    ("output2_scale_scalar", lambda t: t[:3], "output2_scale_scalar is float32 \\[3\\]"),
    ("output2_scale_scalar", lambda t: t.repeat(2)[::2], "output2_scale_scalar has strides"),
    ("per_token_scale", lambda t: t[:, None], "per_token_scale is float32 \\[5, 1\\]"),
    ("per_token_scale", lambda t: t.to("meta"), "per_token_scale is on meta"),
    ("gemm1_alpha", lambda t: torch.ones(3), "gemm1_alpha is float32 \\[3\\]"),
    ("gemm1_bias", lambda t: torch.ones(8, 64), "gemm1_bias is float32 \\[8, 64\\]"),
    ("gemm2_bias", lambda t: torch.ones(8, 128).half(), "gemm2_bias is float16"),
    ("num_experts", lambda n: 7, "local_expert_offset is 0; with 8 local experts of 7"),
    ("local_expert_offset", lambda n: 1, "local_expert_offset is 1"),
    (
        "local_num_experts",
        lambda n: 9,
        "local_num_experts is 9; it must be 8, which gemm2_weights hold",
    ),
    ("activation_type", lambda n: 5, "activation_type is .*SwigluBias"),
    ("activation_type", lambda n: 99, "activation_type is 99"),
    ("topk_ids", lambda t: t[0], "topk_ids is int32 \\[5, 1\\]"),
    ("topk_ids", lambda t: (t[0].long(), t[1]), "topk_ids\\[0\\] is int64"),
    ("topk_ids", lambda t: (t[0], t[1].half()), "topk_ids\\[1\\] is float16"),
    ("topk_ids", lambda t: 3, "topk_ids is 3; it must be packed int32"),
    ("top_k", lambda n: 3, "topk_ids\\[0\\] is int32 \\[5, 2\\]"),
    ("output", lambda t: torch.zeros(5, 128).double(), "output is float64"),
    ("valid_hidden_size", lambda n: 130, "valid_hidden_size is 130"),
    ("hidden_states_scale_layout", lambda n: 0, "must be layout_linear"),
    ("finalize_order", lambda n: "any", "finalize_order is 'any'"),
]


@pytest.mark.parametrize(
    "name,change,message", WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)]
)
def test_bad_arguments_are_named(name, change, message):
    case = moe_cases.make(SHAPE)
    given = keywords(case, topk_ids=(case.ids, case.weights))
    given[name] = change(given.get(name))
    if name == "topk_ids" and isinstance(given[name], torch.Tensor):
        given[name] = given[name][:, :1]
    with pytest.raises((ValueError, TypeError), match=message):
        nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**given)


def test_parameters_the_activation_has_not():
    case = moe_cases.make(SHAPE, ActivationType.Geglu)
    with pytest.raises(ValueError, match=r"gemm1_alpha is .*None with activation Geglu"):
        routed(case, (case.ids, case.weights), gemm1_alpha=torch.ones(8))


def test_logits_and_bias():
    case = moe_cases.make(SHAPE)
    with pytest.raises(ValueError, match="routing_logits is float16"):
        from_logits(case, routing_logits=logits_of().half())
    with pytest.raises(ValueError, match="routing_bias is float32 \\[3\\]"):
        from_logits(case, routing_method_type=2, routing_bias=torch.zeros(3))
    with pytest.raises(ValueError, match="routing_method_type is 12"):
        from_logits(case, routing_method_type=12)
    with pytest.raises(ValueError, match="num_fused_shared_experts is 1"):
        from_logits(case, num_fused_shared_experts=1, local_num_experts=7)


def test_order_is_one_tuple():
    assert moe_backends.ORDER == (
        "flashinfer:trtllm",
        "flashinfer:cute-dsl",
        "flashinfer:cutlass",
        "triton",
        "reference",
    )
