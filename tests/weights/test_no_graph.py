"""Preparing a model's parameters adds nothing to their gradients, and keeps no graph alive."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nvfp4_moe import assemble_experts, prepare_experts, with_cute_dsl, with_cutlass
from nvfp4_moe.reference.moe.baseline_moe import FORMATS, prepare_baseline
from nvfp4_moe.reference.weights.versions import tensors_of
from nvfp4_moe.serving.scales import serving_scales

E, H, INTER = 2, 128, 128
STATIC = {"input_amax": 3.0, "intermediate_amax": 5.0}


def parameter(*size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=g).abs().bfloat16().requires_grad_()


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return parameter(E, 2 * INTER, H), parameter(E, H, INTER)


def assembled():
    codes = [
        torch.ones(size, dtype=torch.uint8) for size in ((E, 2 * INTER, H // 2), (E, H, INTER // 2))
    ]
    scales = [c[..., : c.shape[2] // 8].contiguous() for c in codes]
    decode = [parameter(E).float() for _ in range(2)]
    return assemble_experts(codes[0], scales[0], decode[0], codes[1], scales[1], decode[1])


PREPARED = {
    "experts": lambda: prepare_experts(
        *weights(), w13_bias=parameter(E, 2 * INTER), w2_bias=parameter(E, H),
        alpha=parameter(E), beta=parameter(E), clamp_limit=parameter(E),
    ),
    "CuTe-DSL's copy": lambda: with_cute_dsl(prepare_experts(*weights())),
    "cutlass' copy": lambda: with_cutlass(prepare_experts(*weights(), **STATIC)),
    "quantized experts": assembled,
    "a server's scalars": lambda: serving_scales(
        parameter(E, 2).float(), parameter(E).float(), parameter(E).float(), parameter(E).float(),
        activation="static", clamp_limit=7.0,
    ),
    **{
        form: lambda form=form: prepare_baseline(form, *weights(), **STATIC)
        for form in FORMATS if form != "bf16"
    },
}  # fmt: skip


@pytest.mark.parametrize("what", PREPARED)
def test_nothing_requires_a_gradient(what):
    tensors = list(tensors_of(PREPARED[what]()))
    assert tensors and not any(t.requires_grad or t.grad_fn is not None for t in tensors)
