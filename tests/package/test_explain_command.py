"""`nvfp4-moe explain` says what `explain_fused_moe` says, for a GPU that is not here."""

# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from nvfp4_moe import (
    ActivationType,
    Routing,
    RoutingMethodType,
    explain_fused_moe,
    prepare_experts,
)
from nvfp4_moe.__main__ import main
from nvfp4_moe.cli.explain import GPUS, LAYER, QUANTIZER
from nvfp4_moe.exits import Exit

SMALL = ["--hidden", "256", "--intermediate", "128", "--experts", "4", "--top-k", "2"]


@pytest.mark.parametrize("gpu", ["sm_80", "90", "sm_100", "sm_120"])
def test_the_answer_is_the_function_s(gpu, capsys):
    assert main(["explain", "--gpu", gpu, *SMALL, "--activation", "Relu2", "--json"]) == Exit.DONE
    printed = capsys.readouterr()
    ((name, answer),) = json.loads(printed.out)["gpus"].items()
    number = gpu.removeprefix("sm_")
    experts = prepare_experts(
        torch.zeros(4, 128, 256, dtype=torch.bfloat16),
        torch.zeros(4, 256, 128, dtype=torch.bfloat16),
        ActivationType.Relu2,
    )
    expected = explain_fused_moe(
        torch.zeros(16, 256, dtype=torch.bfloat16),
        experts,
        (torch.zeros(16, 4), Routing(RoutingMethodType.Renormalize, top_k=2)),
        capability=(int(number[:-1]), int(number[-1])),
    )
    assert name == f"sm_{number}" and set(answer) == {LAYER, QUANTIZER}
    assert answer[LAYER]["would_run"] == expected.backend
    assert answer[LAYER]["reasons"] == dict(expected.reasons)
    assert answer[LAYER]["notes"] == list(expected.notes)
    assert f"would run: {expected.backend}" in printed.err


def test_every_gpu_where_none_is_here(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["explain", *SMALL]) == Exit.DONE
    printed = capsys.readouterr().out
    assert "this machine has no GPU" in printed
    rows = {line.split()[0] for line in printed.splitlines() if line.startswith("sm_")}
    assert rows == set(GPUS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "H100"], "--gpu is 'H100'; it must be a compute capability"),
        (["--activation", "Gelu9"], "--activation is 'Gelu9'; it must be among Gelu"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--hidden", "100"], "H must be a positive multiple of 16"),
        (["--routing", "Softmax"], "--routing is 'Softmax'; it must be among Default"),
    ],
)
def test_a_layer_that_cannot_be(words, told, capsys):
    assert main(["explain", *SMALL, "--gpu", "90", *words]) == Exit.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
