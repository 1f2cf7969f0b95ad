"""The Triton kernels of a reload in the interpreter, against experts prepared anew."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import reload_cases as cases
import torch

from nvfp4_moe import ActivationType, prepare_experts
from nvfp4_moe.reference import checks

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at inf and NaN
]


def test_reload_is_preparation():
    cases.each_way("cpu", "triton")


def test_every_byte_is_written():
    cases.restored("cpu", "triton")


def test_auto_never_takes_the_interpreter(monkeypatch):
    from nvfp4_moe.kernels.weights import launch as reload_launch

    monkeypatch.setattr(reload_launch, "write", None)  # raises when called
    cases.reloaded(ActivationType.Swiglu, "cpu", "auto")


def test_weights_that_are_not_contiguous():
    kind = ActivationType.Swiglu
    w13, w2 = cases.weights(kind, 1)
    experts = prepare_experts(*cases.weights(kind, 0), kind)
    strided = w13.mT.contiguous().mT
    padded = torch.nn.functional.pad(w2, (1, 0))[..., 1:]
    assert not strided.is_contiguous() and not padded.is_contiguous()
    amax = tuple(w.abs().amax((1, 2)).float() for w in (w13, w2))
    for given in (None, amax):
        experts.load_(strided, padded, amax=given, backend="triton")
        cases.assert_same(experts, prepare_experts(w13, w2, kind), "strided")
        experts.gemm1_weights.zero_()


def test_what_is_not_finite(monkeypatch):
    """As quantization treats it, to the bit, where values are not read, as on a GPU."""
    kind = ActivationType.Swiglu
    monkeypatch.setattr(checks, "reads_values", lambda *tensors, waits=False: False)
    for value in (float("nan"), float("inf"), -float("inf")):
        w13, w2 = cases.weights(kind, 1)
        w13[1, 5, 7] = value
        experts = prepare_experts(*cases.weights(kind, 0), kind)
        experts.load_(w13, w2, backend="triton")
        want = prepare_experts(w13, w2, kind)
        for field in ("gemm1_weights", "gemm1_weights_scale", "output1_scale_gate_scalar"):
            got, expected = getattr(experts, field)[[0, 2]], getattr(want, field)[[0, 2]]
            cases.assert_bitwise(got, expected, f"{field}, others than of {value}")
        scalar = experts.output1_scale_gate_scalar[1]
        torch.testing.assert_close(scalar, want.output1_scale_gate_scalar[1], equal_nan=True)
