"""The table of `doctor` says what is missing, and the command that mends it."""

# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

from nvfp4_moe.cli import doctor_table

COMPLETE = {
    "versions": {
        "python": "3.12.1",
        "nvfp4-moe": "0.1.0",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "flashinfer-python": "0.7.4",
        "nvidia-cutlass-dsl": "4.8.1",
    },
    "commit": None,
    "contract": "c0ffee",
    "gpus": ["NVIDIA B200, sm_100, 180 GiB, CUDA 13.0"],
    "driver": "580.1",
    "rcp_table": "the known one",
    "routing_functions": 'functions="hopper", to the bit',
    "flashinfer": {"version": "0.7.4, with the functions described", "differences": []},
    "sums": {"triton": "any order"},
    "system": {
        "system": "Linux 6.8 x86_64",
        "nvcc": "13.0",
        "typer": "0.29.2",
        "rich": "15.0.0",
        "sglang": None,
        "vllm": "0.33.0",
        "transformers": None,
    },
}


def changed(**parts):
    """The complete machine, with other values in its parts."""
    found = {k: dict(v) if isinstance(v, dict) else v for k, v in COMPLETE.items()}
    for name, value in parts.items():
        if isinstance(value, dict):
            found[name].update(value)
        else:
            found[name] = value
    return found


def mends(examined):
    return {thing: mend for thing, _, mend in doctor_table.rows(examined) if mend}


def test_a_complete_machine_needs_nothing():
    assert mends(COMPLETE) == {}
    table = {thing: here for thing, here, _ in doctor_table.rows(COMPLETE)}
    assert table["operating system"] == "Linux 6.8 x86_64" and table["nvcc"] == "13.0"
    assert table["GPU"].startswith("NVIDIA B200") and table["NVIDIA driver"] == "580.1"
    assert (table["vllm"], table["sglang"]) == ("0.33.0", "not installed")
    assert table["rcp.approx"] == "the known one" and table["sums of triton"] == "any order"


@pytest.mark.parametrize(
    ("parts", "thing", "mend"),
    [
        ({"versions": {"triton": None}}, "triton", "pip install triton"),
        (
            {"versions": {"flashinfer-python": None}},
            "flashinfer-python",
            "pip install 'flashinfer-python>=0.7'",
        ),
        ({"system": {"typer": None}}, "typer", "pip install typer"),
        ({"system": {"nvcc": None}}, "nvcc", doctor_table._toolkit()),
        (
            {"flashinfer": {"version": "0.9, not described, with other functions"}},
            "FlashInfer's functions",
            "pip install flashinfer-python==0.7.4",
        ),
    ],
)
def test_what_mends_a_missing_thing(parts, thing, mend):
    assert mends(changed(**parts)) == {thing: mend}


def test_a_driver_without_a_gpu_that_torch_sees():
    found = mends(changed(gpus=[], rcp_table=None, routing_functions=None, sums={}))
    assert list(found) == ["torch"] and "of a CUDA that the driver supports" in found["torch"]


def test_without_a_gpu_flashinfer_is_not_missed():
    bare = {"flashinfer-python": None, "nvidia-cutlass-dsl": None}
    assert mends(changed(gpus=[], driver=None, versions=bare, system={"nvcc": None})) == {}


@pytest.mark.parametrize(
    ("said", "release"),
    [("nvcc: NVIDIA\nCuda compilation tools, release 13.0, V13.0.48\n", "13.0"), ("oops", None)],
)
def test_the_release_of_nvcc(said, release, monkeypatch):
    answer = SimpleNamespace(stdout=said)
    monkeypatch.setattr(doctor_table.subprocess, "run", lambda *_, **__: answer)
    assert doctor_table._nvcc() == release


def test_no_nvcc(monkeypatch):
    monkeypatch.setattr(doctor_table.shutil, "which", lambda _: "/nowhere/nvcc")
    assert doctor_table._nvcc() is None
