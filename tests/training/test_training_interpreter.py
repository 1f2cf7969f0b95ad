"""Training through the Triton kernels in the interpreter: a trainer's batch, a server's tokens."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import training_cases as cases
from moe_cases import Shape

pytestmark = pytest.mark.interpreter
SHAPE = Shape(4, 208, 80, 3, 2)


def test_a_batch_is_its_tokens():
    cases.alone_and_together("cpu", "triton", SHAPE)


def test_inside_the_bounds():
    cases.inside_the_bounds("cpu", "triton", SHAPE)


def test_gradients_are_the_references():
    cases.gradients_are_the_references("cpu", "triton", SHAPE)


def test_nothing_is_loaded_before_the_backward():
    cases.nothing_is_loaded_before_the_backward("cpu", "triton", SHAPE)
