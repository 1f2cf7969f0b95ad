"""Rows of a call are copied at the calls that are due, whole, by a kernel that a graph can replay."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from offline import compile_kernel, resources

from nvfp4_moe.kernels.moe.row_samples.buffer import (
    BEGUN,
    CALLS,
    DONE,
    FIRST,
    TOKENS,
    RowBuffer,
    row_numbers,
    take_rows,
)
from nvfp4_moe.kernels.moe.row_samples.kernel import take_kernel

H, K = 48, 3


def call(tokens: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16):
    """Hidden states, ids, weights and an output whose rows do not follow one another."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    states, wide = torch.randn(2, tokens, H + 16, generator=g, dtype=torch.float32, device="cpu")
    ids = torch.randint(0, 9, (tokens, K), generator=g, dtype=torch.int32, device="cpu")
    weights = torch.rand(tokens, K, generator=g, dtype=torch.float32, device="cpu")
    made = states[:, :H].bfloat16().contiguous(), ids, weights.to(dtype)
    return *(t.to(device) for t in made), wide.bfloat16().to(device)[:, :H]


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_of_the_last_call_that_was_due(tokens, dtype, device):
    rows, period, phase = 3, 4, 2
    buffer = RowBuffer.like(rows, *call(tokens, 0, device, dtype))
    samples = 0
    for n in range(13):
        tensors = call(tokens, n, device, dtype)
        take_rows(buffer, tensors, period, phase)
        if n == 0 or n % period == phase:
            numbers = row_numbers(samples, rows, tokens)
            want = [t[numbers] for t in tensors]
            samples += 1
        counts = buffer.counts.tolist()
        assert (counts[CALLS], counts[BEGUN], counts[DONE]) == (n + 1, samples, samples)
        assert (counts[TOKENS], counts[FIRST]) == (tokens, numbers[0])
        for got, expected in zip(buffer.rows, want, strict=True):
            assert torch.equal(got[: len(numbers)], expected)
            assert not got[len(numbers) :].any(), "a row beyond the call's"
    assert samples == 4


def test_all_rows_come_up():
    """Also of a call with as many tokens as there are steps between two samples."""
    for tokens in (1, 7, 64, 1000):
        found = {row for taken in range(tokens) for row in row_numbers(taken, 1, tokens)}
        assert found == set(range(tokens))


@pytest.mark.compile
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_it_compiles_without_local_memory(arch, tmp_path):
    constants = {"ROWS": 2, "STRIDE": 7919, "CHUNK": 2048, "ARCH": arch}
    names = [p.name for p in take_kernel.params]
    types = {n: "*i16" if n.endswith("_ptr") else "i32" for n in names} | {"counts_ptr": "*i64"}
    aligned = [n for n in names if n.endswith("_ptr") and n not in constants]
    kernel = compile_kernel(take_kernel, arch, types, constants, aligned, num_warps=4)
    assert resources(kernel, tmp_path) == (0, 0)
    assert kernel.asm["ptx"].count("atom.") == 2
