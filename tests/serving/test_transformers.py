"""Real generation of transformers' models with our experts, beside a model of them in plain torch."""

# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from functools import partial

import experts_model
import own_backends
import pytest
import torch
import transformers_models
from paths import ROOT

from nvfp4_moe import register_backend
from nvfp4_moe.canary import Canary
from nvfp4_moe.serving.transformers import IMPLEMENTATIONS, classes, prepare, register
from nvfp4_moe.serving.transformers.packed import ATTRIBUTE

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (make test-transformers)"
)
PROMPTS = torch.tensor([[5, 9, 17, 33, 65], [1, 2, 3, 4, 5]])
PAGE = ROOT / "docs" / "transformers_classes.md"
MODELS = {"nvfp4_moe": True, "nvfp4_moe_w4a16": False}
"""Implementations, and whether they quantize activations."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Our experts and, as "model of ...", the ones in plain torch, whose math is exact."""
    from transformers.integrations.moe import ExpertsInterface

    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    transformers.logging.set_verbosity_error()
    register()
    for name, quantizes in MODELS.items():
        ExpertsInterface.register(
            f"model of {name}", partial(experts_model.experts_forward, quantizes)
        )


def generated(model, implementation: str, prompts=PROMPTS, tokens: int = 16, **options):
    model.set_experts_implementation(implementation)
    found = model.generate(prompts, max_new_tokens=tokens, do_sample=False, **options)
    return found[:, prompts.shape[1] :]


@pytest.mark.parametrize("implementation", MODELS)
@pytest.mark.parametrize("name", transformers_models.CONFIGURATIONS)
def test_tokens_are_those_of_the_experts_in_plain_torch(name, implementation):
    model = transformers_models.model(transformers, name)
    want = generated(model, f"model of {implementation}")
    assert torch.equal(generated(model, implementation), want)
    assert not torch.equal(generated(model, "eager"), want), "the experts decide no token"


def test_from_pretrained_takes_the_name(tmp_path):
    model = transformers_models.model(transformers, "qwen3")
    model.save_pretrained(tmp_path)
    for name in IMPLEMENTATIONS:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, experts_implementation=name
        )
        assert loaded.config._experts_implementation == name
        assert torch.equal(generated(loaded, name, tokens=4), generated(model, name, tokens=4))


def test_a_token_does_not_depend_on_its_batch():
    model = transformers_models.model(transformers, "mixtral")
    name = "nvfp4_moe_batch_invariant"
    together = generated(model, name)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(generated(model, name, prompt[None])[0], together[row])


def test_continuous_batching_gives_the_tokens_of_the_experts_in_plain_torch():
    """Paged attention has other bits than `generate`, so the two runs differ in their experts alone."""
    pytest.importorskip("psutil", reason="transformers batches on a CPU with psutil alone")
    model = transformers_models.model(transformers, "qwen3")
    model.set_attn_implementation("paged|eager")

    def batched(implementation):
        model.set_experts_implementation(implementation)
        done = model.generate_batch(
            [[5, 9, 17, 33, 65], [1, 2, 3]],
            generation_config=transformers.GenerationConfig(
                max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                num_blocks=16, max_batch_tokens=32, block_size=16
            ),
        )
        return [done[f"req_{i}"].generated_tokens for i in range(2)]

    got = batched("nvfp4_moe")
    assert [len(tokens) for tokens in got] == [6, 6]
    assert got == batched("model of nvfp4_moe")


def test_a_compiled_decode_gives_the_tokens_of_an_eager_one():
    model = transformers_models.model(transformers, "gpt-oss")
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # on a CPU too
    want = generated(model, "nvfp4_moe", tokens=4)
    torch._dynamo.utils.counters.clear()
    got = generated(
        model, "nvfp4_moe", tokens=4, cache_implementation="static", compile_config=config
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert torch.equal(got, want)


def test_a_model_that_was_not_prepared_says_so_when_it_is_compiled():
    model = transformers_models.model(transformers, "mixtral")
    model.set_experts_implementation("nvfp4_moe")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"prepare\(model\)"):
        compiled(PROMPTS)
    torch._dynamo.reset()
    assert prepare(model) == 2
    with torch.no_grad():
        assert torch.equal(compiled(PROMPTS).logits, model(PROMPTS).logits)


def test_a_step_of_an_optimizer_changes_what_is_served():
    model = transformers_models.model(transformers, "qwen3")
    model.set_experts_implementation("nvfp4_moe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(PROMPTS, labels=PROMPTS).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        served = model(PROMPTS).logits
        layers = [m for m in model.modules() if hasattr(m, ATTRIBUTE)]
        for layer in layers:
            delattr(layer, ATTRIBUTE)
        assert torch.equal(model(PROMPTS).logits, served)
    assert len(layers) == 2


def test_a_canary_changes_no_token_and_catches_a_wrong_kernel(tmp_path):
    from transformers.integrations.moe import ExpertsInterface

    model = transformers_models.model(transformers, "qwen3")
    want = generated(model, "nvfp4_moe", tokens=4)
    canary = Canary(2, folder=tmp_path)
    register(canary)
    assert torch.equal(generated(model, "nvfp4_moe", tokens=4), want)
    canary.wait()
    assert canary.counts.inside == canary.counts.taken >= 2 and not list(tmp_path.iterdir())
    with register_backend(
        "fused_moe", "wrong", own_backends.layer_without_a_tile, before="reference"
    ):
        generated(model, "nvfp4_moe", tokens=8)
        canary.wait()
    assert canary.counts.outside and list(tmp_path.iterdir())
    register()
    assert ExpertsInterface._global_mapping["nvfp4_moe"].keywords == {"canary": None}


def test_without_a_canary_none_is_imported():
    program = (
        "import sys; from nvfp4_moe.serving.transformers import register; register();"
        "print([n for n in sys.modules if n.startswith(('nvfp4_moe.canary', 'nvfp4_moe.diff'))])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


ROWS = classes.rows()


def test_the_table_is_that_of_this_version():
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in page:
        pytest.skip(f"the page is not of transformers {transformers.__version__}")
    assert classes.markdown() == page


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_class_is_served_or_refused_with_its_reason(row):
    """Served, its outputs are those of the experts in plain torch; sizes are small ones."""
    served, refusal = row.answer
    assert bool(served) != bool(refusal)
    assert row.module is not None, row.failure
    if refusal:
        return
    module, experts, hidden, intermediate = row.module, 4, 32, 48
    torch.manual_seed(0)
    sizes = {"down_proj": (hidden, intermediate), "up_proj": (intermediate, hidden)}
    sizes["gate_up_proj"] = (2 * intermediate, hidden)
    for name, parameter in list(module.named_parameters()):
        rows, columns = sizes[name.removesuffix("_bias")]
        shape = (columns, rows) if module.is_transposed else (rows, columns)
        shape = (rows,) if name.endswith("_bias") else shape
        weight = torch.randn(experts, *shape, dtype=torch.float32, device="cpu") / 4
        setattr(module, name, torch.nn.Parameter(weight.bfloat16(), parameter.requires_grad))
    x = torch.randn(6, hidden, dtype=torch.float32, device="cpu").bfloat16()
    ids = torch.randint(experts, (6, 2))
    weights = torch.rand(6, 2, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, quantizes in MODELS.items():
            module.config._experts_implementation_internal = name
            want = experts_model.experts_forward(quantizes, module, x, ids, weights)
            got = module(x, ids, weights)
            assert (got != want).float().mean() < 0.01, "an activation's last bit, at most"
            torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) / 64)
