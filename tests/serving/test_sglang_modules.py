"""SGLang's own classes and loaders with the plug-in, on a CPU: its experts have the bits of ours.

`make sglang-test` runs it. A whole engine needs kernels that SGLang's packages have for GPUs alone: here
are its configuration, its model loader, its layer of experts, its dispatcher and its MoE runner. They
load a Qwen3-MoE of two layers, and the experts then run with a routing that the test gives.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib
import importlib.metadata

import fake_sglang
import own_backends
import pytest
import sglang_real
import torch
import vllm_models
from assertions import assert_bitwise
from fake_sglang import runner_config
from server_cases import methods_of, signature
from sglang_real import loaded, served

import nvfp4_moe
from nvfp4_moe import UnsupportedError
from nvfp4_moe.canary import from_environment
from nvfp4_moe.checkpoints.convert import convert
from nvfp4_moe.checkpoints.load import load_experts
from nvfp4_moe.serving import sglang as plugin
from nvfp4_moe.serving.packing import tensors_of

EXPERTS, HIDDEN, TOP_K, TOKENS, LAYERS = 8, 128, 2, 5, 2


def _installed() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "none"


if _installed() != plugin.VERSION:
    reason = f"sglang {plugin.VERSION} is not installed (make sglang-test)"
    pytest.skip(reason, allow_module_level=True)
sglang_real.install()


@pytest.fixture(scope="module", autouse=True)
def exact_quantizer():
    """`convert` and `prepare_experts` then give the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model in bf16, in ModelOpt's NVFP4 and in compressed-tensors'."""
    folder = tmp_path_factory.mktemp("models")
    vllm_models.write(folder / "bf16")
    convert(folder / "bf16", folder / "modelopt")
    vllm_models.write_compressed(folder / "modelopt", folder / "compressed")
    return folder


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers]


def call(seed=3, experts=EXPERTS):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(TOKENS)]).int()
    return x, torch.rand(TOKENS, TOP_K, generator=g), ids


RUNS = {
    "bf16": ("bf16", "nvfp4_moe"),
    "bf16, W4A16": ("bf16", "nvfp4_moe_w4a16"),
    "ModelOpt": ("modelopt", "nvfp4_moe"),
    "ModelOpt, W4A16": ("modelopt", "nvfp4_moe_w4a16"),
    "compressed-tensors": ("compressed", "nvfp4_moe"),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_model_that_sglang_loads_has_the_bits_of_our_loader(run, models):
    name, quantization = RUNS[run]
    model, method = loaded(models / name, quantization)
    assert method == quantization + ("" if name == "bf16" else "_checkpoint")
    assert len(experts_of(model)) == LAYERS
    for i, layer in enumerate(experts_of(model)):
        assert type(layer).__module__ == "sglang.srt.layers.moe.fused_moe_triton.layer"
        assert layer.runner_backend.value == plugin.BACKEND
        x, weights, ids = call(i)
        want = nvfp4_moe.fused_moe(
            x,
            load_experts(models / "modelopt", i),
            (ids, weights),
            activation=plugin.QUANTIZATIONS[quantization],
        )
        assert_bitwise(served(layer, x, weights, ids), want, f"layer {i}")


@pytest.mark.parametrize(
    ("name", "quantization", "more", "message"),
    [
        ("modelopt", "nvfp4_moe_static", {}, "never calibrated"),
        ("bf16", "nvfp4_moe_static", {}, "in bf16 and has no static activation scales"),
        ("bf16", "nvfp4_moe", {"moe_runner_backend": "triton"}, "runner-backend is triton"),
    ],
)
def test_errors_reach_the_user(name, quantization, more, message, models):
    with pytest.raises((UnsupportedError, ValueError), match=message):
        loaded(models / name, quantization, **more)


def test_deterministic_inference_and_our_runner_by_name(models):
    model, _ = loaded(
        models / "modelopt",
        "nvfp4_moe",
        moe_runner_backend=plugin.BACKEND,
        enable_deterministic_inference=True,
        attention_backend="triton",
    )
    assert all(layer.quant_method.batch_invariant for layer in experts_of(model))


def test_the_canary_catches_a_wrong_kernel_in_sglangs_layers(models, tmp_path, monkeypatch):
    """The first call of each layer is judged, the second one step later."""
    monkeypatch.setenv("NVFP4_MOE_CANARY", "1")
    monkeypatch.setenv("NVFP4_MOE_CANARY_FOLDER", str(tmp_path))
    model, _ = loaded(models / "modelopt", "nvfp4_moe")
    canary = from_environment()
    for layer in experts_of(model):
        served(layer, *call())
    canary.wait()
    assert canary.counts.inside == LAYERS and canary.counts.outside == 0, canary.counts
    wrong = own_backends.layer_without_a_tile
    with nvfp4_moe.register_backend("fused_moe", "wrong", wrong, before="reference"):
        for layer in experts_of(model):
            served(layer, *call())
        canary.wait()
    assert canary.counts.outside > 0 and any(tmp_path.iterdir()), canary.counts


def test_an_update_from_disk_runs_in_the_memory_of_the_first_weights(models, tmp_path):
    """As SGLang's `update_weights_from_disk` does: restore, load and postprocess."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_models, "SEED", 7)
        vllm_models.write(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "second")
    model, _ = loaded(models / "modelopt", "nvfp4_moe")
    experts = [layer.quant_method.experts for layer in experts_of(model)]
    before = [{n: t.data_ptr() for n, t in tensors_of(e).items()} for e in experts]
    sglang_real.update_from_disk(model, tmp_path / "second")
    assert [{n: t.data_ptr() for n, t in tensors_of(e).items()} for e in experts] == before
    for i, layer in enumerate(experts_of(model)):
        x, weights, ids = call(i)
        want = nvfp4_moe.fused_moe(x, load_experts(tmp_path / "second", i), (ids, weights))
        assert_bitwise(served(layer, x, weights, ids), want, f"layer {i}")


def test_weights_that_sglang_does_not_restore_first_are_refused(models):
    model, _ = loaded(models / "bf16", "nvfp4_moe")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    new = torch.zeros(64, HIDDEN, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(UnsupportedError, match="packed for nvfp4-moe"):
        model.load_weights([(name, new)])


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_of_another_rank_add_nothing(shared, models):
    """Two ranks of four experts, and one that is shared, which SGLang fuses with the routed ones."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization import get_quantization_config

    g = torch.Generator().manual_seed(5)
    experts = EXPERTS + shared
    w13 = torch.randn(experts, 128, HIDDEN, generator=g).bfloat16()
    w2 = torch.randn(experts, HIDDEN, 64, generator=g).bfloat16()
    x, weights, ids = call(experts=EXPERTS)
    if shared:
        ids[:, 1] = EXPERTS
    sglang_real.settings(models / "modelopt", "nvfp4_moe")
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float32, device="cpu")
    for number in range(2):
        with sglang_real.one_rank_of_experts(number, 2):
            layer = FusedMoE(
                experts, HIDDEN, 64, 0, top_k=TOP_K, params_dtype=torch.bfloat16,
                num_fused_shared_experts=shared, prefix="model.layers.0.mlp.experts",
                quant_config=get_quantization_config("nvfp4_moe")(),
            )  # fmt: skip
            for e in range(experts):
                for shard, weight in zip(("w1", "w3"), w13[e].chunk(2), strict=True):
                    layer.weight_loader(layer.w13_weight, weight, "w13_weight", shard, e)
                layer.weight_loader(layer.w2_weight, w2[e], "w2_weight", "w2", e)
            layer.quant_method.process_weights_after_loading(layer)
            got = served(layer, x, weights, ids)
        here = [*range(4 * number, 4 * number + 4), *range(EXPERTS, experts)]
        local = [[here.index(i) if i in here else -1 for i in row] for row in ids.tolist()]
        up_gate = torch.cat(w13[here].chunk(2, 1)[::-1], 1)
        want = nvfp4_moe.fused_moe(
            x, nvfp4_moe.prepare_experts(up_gate, w2[here]), (torch.tensor(local).int(), weights)
        )
        assert_bitwise(got, want, f"rank {number}")
        total += got.float()
    assert total.isfinite().all() and total.any(1).all()


def test_the_installed_package_has_the_entry_point():
    found = importlib.metadata.entry_points(group="sglang.srt.plugins", name="nvfp4_moe")
    if not found:
        pytest.skip("nvfp4-moe is not installed (pip install -e .)")
    assert {f.value for f in found} == {"nvfp4_moe.serving.sglang:register"}


def test_sglangs_command_line_knows_the_names():
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    options = ["--quantization", "nvfp4_moe", "--moe-runner-backend", plugin.BACKEND]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerArgs, "resolve_once", lambda self: self, raising=False)
        made = prepare_server_args(["--model-path", "dummy", "--device", "cpu", *options])
    assert (made.quantization, made.moe_runner_backend) == ("nvfp4_moe", plugin.BACKEND)


METHODS = methods_of(fake_sglang)
OWN = {"FusedMoE", "RegisteredMoeRunnerBackend", "StandardCombineInput", "MoeQuantInfo"}
"""Classes of which the fake has fields of its own, or a dataclass's or a tuple's methods."""


@pytest.mark.parametrize(
    ("module", "thing", "name"), METHODS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_the_fake_has_sglangs_signatures(module, thing, name):
    real = getattr(importlib.import_module(module), thing.__name__)
    if name is None:
        assert signature(thing) == signature(real)
    elif thing.__name__ not in OWN and not (name == "__init__" and "Config" in thing.__name__):
        assert signature(getattr(thing, name)) == signature(getattr(real, name))


def test_the_fake_has_fields_of_sglangs_configuration_of_a_layer():
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

    made = vars(runner_config())
    assert made == {name: getattr(MoeRunnerConfig, name) for name in made}
