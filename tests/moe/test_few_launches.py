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


@pytest.mark.parametrize("activation,fewer", [("per-token", 6), ("bf16", 5)])
def test_launches(monkeypatch, activation, fewer):
    """Routing, prologue, both GEMMs, the finalize; per token also the second quantization."""
    case = moe_cases.make(Shape(17, 512, 256, 32, 4), mode="bf16")
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
