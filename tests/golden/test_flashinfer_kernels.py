"""Ours against outputs of FlashInfer's own kernels: a sample here, all of it by `make golden`."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from dataclasses import replace

import pytest
from oracle import __main__ as command
from oracle import cutlass, finalize, quantizers, routing
from oracle.cases import Golden, Outcome, load
from oracle.implementations import REFERENCE, triton

from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType

EVERY = 4
"""One case in so many runs; they take half a minute."""


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load()


def assert_equal(outcomes: Iterable[Outcome], least: int) -> None:
    """As many arrays as there are, and each of them equal."""
    found = list(outcomes)
    assert len(found) >= least
    assert not [str(outcome) for outcome in found if outcome.differing]


def test_parts_are_the_whole(golden):
    """`python -m oracle --jobs 5` compares every case once."""
    parts = [replace(golden, part=(which, 5)) for which in range(5)]
    for kind, key in (("routing", routing.GIVEN), ("quantize", quantizers.CUDA)):
        whole = list(golden.cases(kind, key))
        assert len(whole) > 5
        assert [case for part in parts for case in part.cases(kind, key)] == whole


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--jobs", "0"], "--jobs is 0; it must be an integer of at least 1"),
        (["--every", "0"], "--every is 0; it must be an integer of at least 1"),
        (["--triton", "--device", "nothing"], "--device is 'nothing'; it must be a device of this"),
        (["--arrays", "nowhere"], "--arrays: nowhere has no .npz and no .npz.xz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line(words, told, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["oracle", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_reference_routes_as_the_kernels(golden):
    assert_equal(routing.compare(golden, REFERENCE, EVERY), 180)


def test_reference_routes_to_the_bit(golden):
    """With the functions of the GPU that the kernels ran on."""
    assert_equal(routing.compare_exactly(golden, REFERENCE, EVERY), 180)


def test_reference_finalizes_as_the_kernels(golden):
    assert_equal(finalize.compare(golden, REFERENCE, EVERY), 120)


def test_reference_quantizes_as_the_kernels(golden):
    assert_equal(quantizers.compare(golden, REFERENCE, EVERY), 600)


def test_reference_activates_as_the_kernels(golden):
    assert_equal(finalize.compare_activation(golden), 3)
    assert_equal(cutlass.compare(golden, EVERY), 90)


def test_order_of_the_sum_of_errors(golden):
    assert_equal(cutlass.compare_sums(golden), 36)


@pytest.mark.interpreter
def test_triton_routes_as_the_kernels(golden):
    assert_equal(routing.compare(golden, triton("cpu"), 15, most_tokens=16), 15)


@pytest.mark.interpreter
def test_triton_routes_to_the_bit(golden):
    assert_equal(routing.compare_exactly(golden, triton("cpu"), 25, most_tokens=8), 7)


@pytest.mark.gpu
def test_triton_routes_to_the_bit_on_a_gpu(golden):
    """By the instructions of the GPU at hand, where they are those of FlashInfer's."""
    ours, hopper = triton("cuda"), Routing(RoutingMethodType.Sigmoid, 1, functions="hopper")
    if reason := ours.routing_refusal(hopper):
        pytest.skip(reason)
    assert_equal(routing.compare_exactly(golden, ours, EVERY), 150)


@pytest.mark.interpreter
def test_triton_finalizes_as_the_kernels(golden):
    assert_equal(finalize.compare(golden, triton("cpu"), 5, most_slots=54), 40)


@pytest.mark.interpreter
def test_triton_quantizes_as_the_kernels(golden):
    assert_equal(quantizers.compare(golden, triton("cpu"), 24, most_rows=33), 90)
