"""The text of experts: two lines of shapes and facts, none of their values."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.baseline_moe import prepare_baseline
from nvfp4_moe.reference.weights.cute_dsl import with_cute_dsl
from nvfp4_moe.reference.weights.cutlass import with_cutlass
from nvfp4_moe.reference.weights.prepare import prepare_experts

E, H, I = 4, 256, 128  # noqa: E741


def weights(gated=True):
    rng = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, (1 + gated) * I, H, generator=rng).bfloat16()
    return w13, torch.randn(E, H, I, generator=rng).bfloat16()


def test_two_lines():
    first, second = repr(prepare_experts(*weights())).splitlines()
    assert first == (
        "Experts(4 experts, hidden_size 256, intermediate_size 128, Swiglu, NVFP4, activation "
        "scales per token)"
    )
    # Codes of half a byte, scales of a byte for 16 values, three fp32 scalars an expert.
    size = E * 3 * H * I // 2 + E * 3 * H * I // 16 + E * 3 * 4
    assert second == (
        "  gemm1_weights uint8 [4, 256, 128], gemm2_weights uint8 [4, 256, 64]; "
        f"{size:,} bytes on cpu"
    )


def test_what_they_hold_beside_the_weights():
    experts = prepare_experts(
        *weights(gated=False),
        ActivationType.Relu2,
        input_amax=3.0,
        intermediate_amax=2.0,
        w2_bias=torch.zeros(E, H),
    )
    shown = repr(replace(experts, shard=(1, 2), router_weight_on_input=True))
    for told in ("Relu2", "scales static", "shard 1 of 2", "router's weights", "with gemm2_bias"):
        assert told in shown
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize("copy", [with_cute_dsl, with_cutlass])
def test_copies_count_and_show_no_values(copy):
    static = {"input_amax": 3.0, "intermediate_amax": 2.0} if copy is with_cutlass else {}
    experts = prepare_experts(*weights(), **static)
    copied = copy(experts)
    name = copy.__name__.removeprefix("with_")
    assert f"with {name})" in repr(copied) and len(repr(copied).splitlines()) == 2
    assert repr(copied) != repr(experts) and "tensor(" not in repr(getattr(copied, name))


def test_other_layers_show_no_values():
    assert "w13=bfloat16 [4, 256, 256]" in repr(prepare_baseline("bf16", *weights()))
