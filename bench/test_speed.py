"""pytest-benchmark comparisons of the backends: `python -m pytest bench`, on a machine with a GPU.

Device time of calls in a CUDA graph, inputs on the GPU. A group holds one shape, so that its table
compares what runs here: Triton (and what its options cost), FlashInfer where it serves, the reference,
and for the mixture of experts two bf16 layers, `torch._grouped_mm`'s and Triton's, tuned, and
FlashInfer's own of BF16, FP8 and MXFP8, from bf16 hidden states and logits as ours.
`quantize_speed.py` and `moe_speed.py` print the project's own tables, with ratios and floors.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from dataclasses import replace

import benchmark_json
import bf16_layer
import measure
import moe_speed
import pytest
import torch
from moe_speed import Shape

import nvfp4_moe
from nvfp4_moe import NVFP44Over6Config, Routing, RoutingMethodType
from nvfp4_moe.kernels.baseline_moe.backends import BASELINE_MOE
from nvfp4_moe.kernels.baseline_moe.call import BaselineCall
from nvfp4_moe.kernels.flashinfer import baseline_moe
from nvfp4_moe.reference.moe import baseline_moe as reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CALLS = 10  # in one graph, so that a replay's own cost is a tenth


def device_time(benchmark, call, *, graph: bool = True) -> None:
    """Benchmark `call` by the GPU's clock; outside a graph where the call waits for the GPU."""
    call()
    replay, calls = call, 1
    if graph:
        replay, calls = measure.captured(call, CALLS).replay, CALLS
    else:
        call()
        torch.cuda.synchronize()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    benchmark._timer = lambda: _seconds_since(origin) / calls
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)


def _seconds_since(origin: torch.cuda.Event) -> float:
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return origin.elapsed_time(now) / 1e3


def skip_unless_it_serves(explanation, backend: str) -> None:
    if (reason := explanation.reason(backend)) is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize(
    "backend", ["triton", "flashinfer:cuda", "flashinfer:cute-dsl", "reference"]
)
@pytest.mark.parametrize("recipe", ["fast", "exact", "fast-4over6"])
@pytest.mark.parametrize("rows,columns", [(1, 7168), (128, 7168), (8192, 4096)], ids=str)
def test_quantize(benchmark, rows, columns, recipe, backend):
    benchmark.group = f"quantize {rows} x {columns} {recipe}"
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    options = {
        "per_token_activation": True,
        "fast_math": recipe != "exact",
        "build": "cute-dsl" if backend.endswith("dsl") else "cuda",
        "nvfp4_4over6": NVFP44Over6Config() if "4over6" in recipe else None,
    }
    args = (x, 1 / 2688, nvfp4_moe.SfLayout.layout_linear)
    skip_unless_it_serves(nvfp4_moe.explain(*args, **options), backend)
    device_time(
        benchmark,
        lambda: nvfp4_moe.nvfp4_quantize(*args, backend=backend, **options),
        graph=backend != "reference",
    )


LAYERS = {
    "triton": {"backend": "triton"},
    "triton, batch-invariant": {"backend": "triton", "batch_invariant": True},
    "triton, W4A16": {"backend": "triton", "activation": "bf16"},
    "flashinfer:trtllm": {"backend": "flashinfer:trtllm"},
}
BF16 = ("torch._grouped_mm, bf16", "triton, bf16")


BASELINES = {name: format for format, name in baseline_moe.NAMES.items()}


def baseline_call(s: Shape, backend: str, x, logits):
    """A call of FlashInfer's layer of a format, its hidden states quantized in it; or skip."""
    if s.biased:
        pytest.skip("FlashInfer's layers beside NVFP4 are measured without biases")
    format = BASELINES[backend]
    w = moe_speed.bf16_weights(s)
    raw = reference.BaselineExperts(format, s.activation, w.w13, w.w2)
    request = BaselineCall(
        reference.BaselineActivations(x),
        raw,
        {},
        Routing(RoutingMethodType.Renormalize, s.top_k),
        s.routed,
        logits=logits,
    )
    if (reason := BASELINE_MOE.refusal(backend, request)) is not None:
        pytest.skip(reason)
    amax = {"input_amax": 8.0, "intermediate_amax": 8.0} if format == "fp8 per tensor" else {}
    try:
        experts = reference.prepare_baseline(format, w.w13, w.w2, s.activation, **amax)
    except ValueError as error:
        pytest.skip(str(error))
    weights = baseline_moe.flashinfer_weights(experts)
    request = replace(request, experts=experts, weights=weights)

    def call():
        quantized = replace(request, activations=baseline_moe.quantize(x, experts))
        return BASELINE_MOE.run(backend, quantized)

    some = reference.quantize_for(x[:5], experts)
    want = BASELINE_MOE.run("reference", replace(request, activations=some, logits=logits[:5]))
    assert (call()[:5].double() - want.double()).norm() < 1e-1 * want.double().norm()
    return call


@functools.cache
def rates() -> dict[str, float]:
    """The rates of this GPU, for the roofline."""
    return {"copy_gb_s": measure.copy_rate(), "cublas_tflops": measure.cublas_rate()}


@functools.lru_cache(maxsize=1)
def experts_of(s: Shape) -> nvfp4_moe.Experts:
    return moe_speed.random_experts(s)


CASES = [
    pytest.param(s, tokens, layer, id=benchmark_json.case(s.name, tokens, layer))
    for s in moe_speed.SHAPES
    for tokens in moe_speed.TOKENS
    for layer in (*LAYERS, *BF16, *BASELINES)
]


@pytest.mark.parametrize("s,tokens,layer", CASES)
def test_moe(benchmark, s, tokens, layer):
    benchmark.group = benchmark_json.group(s.name, tokens)
    x, logits = moe_speed.inputs(s, tokens)
    slots = moe_speed.experts_of_local_slots(s, logits)
    benchmark.extra_info |= moe_speed.case_info(s.name, tokens, layer)
    benchmark.extra_info |= moe_speed.work(s, slots) | rates()
    device_time(benchmark, layer_call(s, x, logits, layer, slots.numel()))


def layer_call(s: Shape, x: torch.Tensor, logits: torch.Tensor, layer: str, slots_here: int):
    """A call of one layer; or skip, where it does not run here."""
    if layer in BASELINES:
        return baseline_call(s, layer, x, logits)
    if layer in BF16:
        w = moe_speed.bf16_weights(s)
        if layer == "triton, bf16":
            tiles = bf16_layer.tune(x, logits, w, s.top_k, CALLS)
            return lambda: bf16_layer.layer(x, logits, w, s.top_k, tiles)
        return lambda: moe_speed.grouped_mm_layer(x, logits, w, s.top_k, slots_here)
    experts, routing = experts_of(s), (logits, Routing(RoutingMethodType.Renormalize, s.top_k))
    options = LAYERS[layer] | {"fast_math": True}
    explanation = nvfp4_moe.explain_fused_moe(x, experts, routing, **options)
    skip_unless_it_serves(explanation, options["backend"])
    return lambda: nvfp4_moe.fused_moe(x, experts, routing, **options)
