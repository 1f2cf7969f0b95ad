"""Generation on a GPU with our experts: Triton kernels, CUDA graphs, a compiled decode, new weights."""

# SPDX-License-Identifier: Apache-2.0
from functools import partial

import experts_model
import pytest
import torch
import transformers_models
from transformers_decode import PROMPTS, Decode, made, prompts, state

from nvfp4_moe.serving.transformers import IMPLEMENTATIONS, prepare, register
from nvfp4_moe.serving.transformers.forward import experts_forward

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.gpu

NAMES = list(transformers_models.CONFIGURATIONS)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")  # the plain experts' math
    transformers.logging.set_verbosity_error()
    register()


def generated(model, tokens: int = 12, **options) -> torch.Tensor:
    found = model.generate(prompts(), max_new_tokens=tokens, do_sample=False, **options)
    return found[:, len(PROMPTS[0]) :]


@pytest.mark.parametrize("implementation", ["nvfp4_moe", "nvfp4_moe_w4a16"])
@pytest.mark.parametrize("name", NAMES)
def test_each_call_of_a_generation_is_that_of_the_experts_in_plain_torch(name, implementation):
    """Each call is compared on its own inputs, since sums in fp32 have an order of their own."""
    from transformers.integrations.moe import ExpertsInterface

    ours = IMPLEMENTATIONS[implementation]
    plain = partial(experts_model.experts_forward, ours.activation == "per-token")
    far, different, outputs = 0.0, 0, 0

    def beside_plain_torch(module, *arguments):
        nonlocal far, different, outputs
        got, want = experts_forward(ours, module, *arguments), plain(module, *arguments)
        far = max(far, float((got.float() - want.float()).abs().max() / want.abs().max()))
        different, outputs = different + int((got != want).sum()), outputs + got.numel()
        return got

    ExpertsInterface.register("beside plain torch", beside_plain_torch)
    ExpertsInterface.register("plain torch", plain)
    tokens = generated(model := made(name, "beside plain torch"))
    assert len({row for row in tokens.flatten().tolist()}) > 4, "a model that says one thing"
    model.set_experts_implementation("plain torch")
    same = float((generated(model) == tokens).float().mean())
    print(
        f"{name} {implementation}: {different} of {outputs} outputs differ, {same:.0%} of tokens equal"
    )
    assert outputs and different / outputs < 0.02
    assert far < 1 / 32


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_captured_step_has_the_bits_of_an_eager_one(name):
    """Also over new weights, which the graph reads at its next replay."""
    model = made(name)
    eager, captured = Decode(model), Decode(model)
    start = [(t, t.clone()) for t in state(captured)]
    captured.step()  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = captured.step()
    for tensor, value in start:
        tensor.copy_(value)
    for change in range(2):
        for _ in range(4):
            want = eager.step()
            graph.replay()
            assert torch.equal(logits, want)
            assert torch.equal(captured.token, eager.token)
        if change == 0:
            before = logits.clone()
            for layer in model.model.layers:
                if hasattr(layer.mlp, "experts"):
                    layer.mlp.experts.down_proj.mul_(-2)
            assert prepare(model) > 0
    assert not torch.equal(before, logits)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_decode_compiled_to_cuda_graphs_gives_the_tokens_of_an_eager_one(name):
    """Its kernels are the eager ones: the backend is torch's `cudagraphs`, without inductor."""
    model = made(name)
    want = generated(model, cache_implementation="static", disable_compile=True)
    config = transformers.CompileConfig(backend="cudagraphs", fullgraph=True, mode=None)
    torch._dynamo.utils.counters.clear()
    got = generated(model, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert torch.equal(got, want)


def test_inductor_compiles_a_decode():
    """Its norms round otherwise than the eager ones, so tokens may differ; the layer is in one graph."""
    model = made("qwen3")
    want = generated(model, cache_implementation="static", disable_compile=True)
    got = generated(model, cache_implementation="static")
    print(f"inductor: {float((got == want).float().mean()):.0%} of tokens equal eager ones")
    assert got.shape == want.shape


def test_continuous_batching_gives_the_same_tokens_with_cuda_graphs_and_without():
    model = made("qwen3", "nvfp4_moe_batch_invariant")
    model.set_attn_implementation("paged|sdpa")

    def batched(graphs: bool) -> list[list[int]]:
        done = model.generate_batch(
            PROMPTS,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                num_blocks=16, max_batch_tokens=32, block_size=16, use_cuda_graph=graphs
            ),
        )
        return [done[f"req_{i}"].generated_tokens for i in range(len(PROMPTS))]

    got = batched(True)
    assert [len(tokens) for tokens in got] == [8, 8]
    assert got == batched(False)
