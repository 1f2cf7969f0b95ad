"""The kernels encode e2m1 as the reference does: next to every tie, and on a GPU every fp32 number."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from assertions import assert_bitwise
from mutants.generated.jit_calls import e2m1_kernel
from mutants.generated.numbers import specials

from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference.numerics import e2m1

BLOCKS = 4 * 8  # of a program of `e2m1_kernel`
# Ties, and the powers of two where the step of the rounding changes.
EDGES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0)


def check(x, device):
    """Compare the codes of x, and the codes and values of its magnitudes."""
    x = torch.nn.functional.pad(x, (0, -len(x) % (16 * BLOCKS))).view(4, -1, 16)
    a, codes = x.abs(), e2m1.encode(x)
    magnitudes = codes & 7  # of NaN too: 7
    blocks = x.shape[1]
    scales = torch.ones(4, blocks, dtype=torch.float32, device=device)
    words = torch.empty(4, blocks, 2, dtype=torch.int32, device=device)
    values = torch.empty_like(x)
    for given, out, want in ((x, None, codes), (a, values, magnitudes)):
        e2m1_kernel[(1, blocks // 8)](
            given, scales, words, out, blocks, FTZ=False, ARCH=arch(x.device),
            enable_fp_fusion=False,
        )  # fmt: skip
        assert_bitwise(words, e2m1.pack(want).view(torch.int32), "codes")
    assert_bitwise(values, e2m1.decode(magnitudes), "values")


def test_numbers_next_to_ties_and_steps(device):
    edges = torch.tensor(EDGES, dtype=torch.float32).view(torch.int32)
    near = edges[:, None] + torch.arange(-48, 48, dtype=torch.int32)
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float32))
    x = torch.cat([near.flatten().view(torch.float32), powers, powers * 1.5, powers * 1.25])
    check(torch.cat([x, -x, specials()]).to(device), device)


@pytest.mark.gpu
def test_every_fp32_number():
    size = 2**24  # a GPU has at most 2^16 - 1 programs along the second axis
    for first in range(-(2**31), 2**31, size):
        bits = torch.arange(first, first + size, dtype=torch.int64, device="cuda")
        check(bits.to(torch.int32).view(torch.float32), "cuda")
