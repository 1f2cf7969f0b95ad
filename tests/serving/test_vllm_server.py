"""A real vLLM on a CPU with the plug-in, offline and over HTTP: the tokens are transformers' own.

`make server-test` runs it, in an environment of its own. Both sides have our experts and differ in
attention, whose rounding decides no token of this model.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import fake_vllm
import pytest
import vllm_models
from paths import ROOT
from server_cases import methods_of, signature

from nvfp4_moe.checkpoints.convert import convert
from nvfp4_moe.serving.vllm import QUANTIZATIONS

pytest.importorskip("vllm", reason="vllm is not installed (make server-test)")
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("this vllm is no CPU build (make server-test)", allow_module_level=True)

ENVIRONMENT = {
    "FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "tests" / "support"),
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PATIENCE = 900
"""Seconds for one process of vLLM; 60 on an idle machine."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model in bf16, in ModelOpt's NVFP4 and in compressed-tensors'."""
    folder = tmp_path_factory.mktemp("models")
    vllm_models.write(folder / "bf16")
    convert(folder / "bf16", folder / "modelopt")
    vllm_models.write_compressed(folder / "modelopt", folder / "compressed")
    return folder


@pytest.fixture(scope="module")
def wanted(models):
    """The tokens that transformers generates, by the implementation of the experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
        names = ("eager", "nvfp4_moe", "nvfp4_moe_w4a16")
        return {name: vllm_models.generated(models / "bf16", name) for name in names}


def runs_of(models, folder, runs, **environment):
    """The results of `vllm_runs.py`, in a process of its own."""
    runs = [{**run, "model": str(models / run["model"])} for run in runs]
    asked, results = folder / "runs.json", folder / "results.json"
    asked.write_text(json.dumps(runs), encoding="utf-8")
    subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "vllm_runs.py", asked, results],
        env={**os.environ, **ENVIRONMENT, **environment},
        timeout=PATIENCE,
        check=True,
    )
    return json.loads(results.read_text(encoding="utf-8"))


OFFLINE = {
    "vLLM's own bf16": {"model": "bf16"},
    "bf16": {"model": "bf16", "quantization": "nvfp4_moe"},
    "bf16, W4A16": {"model": "bf16", "quantization": "nvfp4_moe_w4a16"},
    "ModelOpt": {"model": "modelopt", "quantization": "nvfp4_moe"},
    "compressed-tensors": {"model": "compressed", "quantization": "nvfp4_moe"},
    "bf16, static": {"model": "bf16", "quantization": "nvfp4_moe_static"},
    "ModelOpt, never calibrated": {"model": "modelopt", "quantization": "nvfp4_moe_static"},
    "routed experts": {
        "model": "bf16",
        "quantization": "nvfp4_moe",
        "enable_return_routed_experts": True,
    },
}


@pytest.fixture(scope="module")
def offline(models, tmp_path_factory):
    results = runs_of(
        models,
        tmp_path_factory.mktemp("offline"),
        list(OFFLINE.values()),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    return dict(zip(OFFLINE, results, strict=True))


@pytest.mark.parametrize("case", ["bf16", "bf16, W4A16", "ModelOpt", "compressed-tensors"])
def test_offline_tokens_are_those_of_transformers_with_our_experts(case, offline, wanted):
    name = OFFLINE[case]["quantization"]
    assert offline[case].get("tokens") == wanted[name], offline[case]
    assert offline["vLLM's own bf16"]["tokens"] == wanted["eager"]
    assert wanted[name] != wanted["eager"], "the experts decide no token"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "bf16, static",
            "UnsupportedError: the checkpoint is in bf16 and has no static activation",
        ),
        ("ModelOpt, never calibrated", "ValueError: the checkpoint's input scales are 1, neutral"),
        ("routed experts", "AuxOutput Connector requires Model Runner V2"),  # vLLM's own
    ],
)
def test_errors_reach_the_user(case, message, offline):
    assert message in offline[case]["error"]


def test_the_canary_catches_a_wrong_kernel_in_the_engine(models, tmp_path):
    """Three tokens between two samples; the second model has the wrong kernel."""
    right, wrong = runs_of(
        models,
        tmp_path,
        [OFFLINE["ModelOpt"], OFFLINE["ModelOpt"] | {"wrong": True}],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        NVFP4_MOE_CANARY="3",
        NVFP4_MOE_CANARY_FOLDER=str(tmp_path / "alarms"),
    )
    assert right["canary"]["inside"] > 0 and right["canary"]["outside"] == 0, right
    assert wrong["canary"]["outside"] > 0, wrong
    assert any((tmp_path / "alarms").iterdir())


@pytest.fixture
def server(models, tmp_path):
    """The address of a server whose engine is a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": models / "bf16", "served-model-name": "tiny", "quantization": "nvfp4_moe",
        "dtype": "bfloat16", "max-model-len": 64, "max-num-seqs": 4, "max-num-batched-tokens": 64,
        "host": "127.0.0.1", "port": port,
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + PATIENCE
        while not _healthy(address):
            told = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            assert process.poll() is None, f"the server has ended:\n{told}"
            assert time.monotonic() < end, f"the server does not answer:\n{told}"
            time.sleep(2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_tokens_over_http_are_those_of_transformers_with_our_experts(server, wanted):
    asked = {
        "model": "tiny",
        "prompt": [vllm_models.text(prompt) for prompt in vllm_models.PROMPTS],
        "max_tokens": vllm_models.TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        choices = json.load(answer)["choices"]
    found = {c["index"]: [int(word[1:]) for word in c["text"].split()] for c in choices}
    assert [found[i] for i in range(len(found))] == wanted["nvfp4_moe"]


def test_the_installed_package_has_the_entry_point():
    from importlib.metadata import entry_points

    (found,) = entry_points(group="vllm.general_plugins", name="nvfp4_moe")
    assert found.value == "nvfp4_moe.serving.vllm:register"
    found.load()()
    from vllm.model_executor.layers.quantization import get_quantization_config

    for name in QUANTIZATIONS:
        assert get_quantization_config(name).name == name


METHODS = methods_of(fake_vllm)


@pytest.mark.parametrize(
    ("module", "thing", "name"), METHODS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_the_fake_has_vllms_signatures(module, thing, name):
    real = getattr(importlib.import_module(module), thing.__name__)
    if name is None:
        assert signature(thing) == signature(real)
    elif name != "__init__" or thing.__name__.endswith("Method") or "FusedMoE" in thing.__name__:
        assert signature(getattr(thing, name)) == signature(getattr(real, name))
