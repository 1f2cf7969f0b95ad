"""A call of few tokens makes up to two launches less on an sm_90, which is pretended here."""

# SPDX-License-Identifier: Apache-2.0
import moe_cases
import pretend_gpu
import pytest
import torch
from moe_cases import Shape

import nvfp4_moe
from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.kernels.moe.hopper.config import refusal

pytestmark = pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))


def _refuse(*_, **__):
    raise AssertionError("the kernels pad rows as they write them")


@pytest.mark.parametrize("hidden,intermediate", [(512, 256), (464, 192)], ids=["whole", "padded"])
@pytest.mark.parametrize("activation,few", [("per-token", 5), ("bf16", 4)])
@pytest.mark.parametrize(
    "method,more", [(RoutingMethodType.Renormalize, 0), (RoutingMethodType.Default, 1)]
)
def test_launches(monkeypatch, activation, few, hidden, intermediate, method, more):
    """Prologue, both GEMMs, the finalize; per token also the second quantization.

    Routing has a launch of its own where scores choose, and for more tokens, whose rows have one, too.
    """
    case = moe_cases.make(Shape(17, hidden, intermediate, 32, 4), mode="bf16")
    monkeypatch.setattr(torch.nn.functional, "pad", _refuse)
    logits = torch.randn(17, 32)
    routing = Routing(method, 4)
    launches = pretend_gpu.present(monkeypatch)
    for tokens, wanted in ((16, few + more), (1, few + more), (17, few + 2)):
        for _ in range(2):  # the first call compiles
            launches.clear()
            nvfp4_moe.fused_moe(
                case.x[:tokens], case.experts, (logits[:tokens], routing),
                activation=activation, backend="triton",
            )  # fmt: skip
        assert len(launches) == wanted, tokens


@pytest.mark.parametrize(
    "tokens,method,said",
    [
        (16, RoutingMethodType.Renormalize, "it routes, sorts the slots and writes the rows"),
        (16, RoutingMethodType.Default, "; it sorts the slots and writes the rows"),
        (17, RoutingMethodType.Renormalize, None),
    ],
)
def test_explained(monkeypatch, tokens, method, said):
    case = moe_cases.make(Shape(17, 512, 256, 32, 4), mode="bf16")
    pretend_gpu.present(monkeypatch)
    found = nvfp4_moe.explain_fused_moe(
        case.x[:tokens], case.experts, (torch.randn(tokens, 32), Routing(method, 4)),
        activation="bf16", backend="triton",
    )  # fmt: skip
    ours = [note for note in found.notes if "grouped GEMM for sm_90" in note]
    assert len(ours) == 1
    assert ours[0].endswith("of so few tokens in one launch") == (said is not None)
    assert said is None or said in ours[0]
