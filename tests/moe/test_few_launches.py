"""A call of few tokens makes one launch less on an sm_90, which is pretended here."""

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
@pytest.mark.parametrize("activation,fewer", [("per-token", 6), ("bf16", 5)])
def test_launches(monkeypatch, activation, fewer, hidden, intermediate):
    """Routing, prologue, both GEMMs, the finalize; per token also the second quantization."""
    case = moe_cases.make(Shape(17, hidden, intermediate, 32, 4), mode="bf16")
    monkeypatch.setattr(torch.nn.functional, "pad", _refuse)
    logits = torch.randn(17, 32)
    routing = Routing(RoutingMethodType.Renormalize, 4)
    launches = pretend_gpu.present(monkeypatch)
    for tokens, wanted in ((16, fewer), (1, fewer), (17, fewer + 1)):
        for _ in range(2):  # the first call compiles
            launches.clear()
            nvfp4_moe.fused_moe(
                case.x[:tokens], case.experts, (logits[:tokens], routing),
                activation=activation, backend="triton",
            )  # fmt: skip
        assert len(launches) == wanted, tokens
