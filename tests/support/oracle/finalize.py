"""The weighted sum of rows against FlashInfer's three finalize kernels, CuTe-DSL's and CUTLASS'."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import torch

from nvfp4_moe.reference.activation import ActivationType, activate

from . import inputs
from .cases import Golden, Outcome, compared, tensor
from .draw import F, bf16_bits, normal
from .implementations import Implementation

TRTLLM, BY_SLOT = "finalize/{}", "fin2/{}"


def compare(
    golden: Golden, ours: Implementation, every: int = 1, most_slots: int = 1 << 30
) -> Iterator[Outcome]:
    for kind, key, order in (
        ("finalize", TRTLLM, "flashinfer"),
        ("finalize-slot", BY_SLOT, "slot"),
    ):
        for c in golden.cases(kind, key, every):
            if c["T"] * c["K"] > most_slots:
                continue
            bits, weights, place = inputs.finalize(c, golden.seed)
            rows, w, p = (
                t.to(ours.device)
                for t in (
                    tensor(bits, c["elt"]),
                    torch.from_numpy(weights),
                    torch.from_numpy(place),
                )
            )
            if c["wbf16"]:
                w = w.bfloat16()
            output = ours.finalize(rows, p, w, c["H"], order)
            kernel = c.get("kernel", "trtllm") or "cutlass"
            group = f"finalize, {kernel.split('_')[0].replace('fin', 'cute-dsl')}, {c['kind']}"
            kept = torch.from_numpy(inputs.kept_tokens(c))
            yield compared(
                group, c["name"], output.cpu()[kept], golden.arrays[key.format(c["name"])]
            )


def compare_activation(golden: Golden) -> Iterator[Outcome]:
    """The unfused SwiGLU kernel of TensorRT-LLM's layer, bf16; it may differ in one last bit."""
    for number, (limit, alpha, beta) in enumerate(
        ((None, None, None), (7.0, 1.702, 1.0), (None, 1.5, None))
    ):
        want = golden.arrays.get(f"activation/{number}")
        if want is None:
            continue
        x = normal(golden.seed, ("act", number), (48, 512)) * F(4)
        raw = tensor(bf16_bits(x), "bf16")[:32].float()
        got = activate(raw, ActivationType.Swiglu, alpha=alpha, beta=beta, clamp_limit=limit)
        near = tensor(want, "bf16").float()
        wrong = (got.bfloat16().float() - near).abs() > near.abs() * 2.0**-7
        name = f"limit {limit}, alpha {alpha}, beta {beta}"
        yield Outcome("activation, unfused SwiGLU", name, wrong.numel(), int(wrong.sum()))
