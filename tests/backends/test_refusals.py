"""Each refusal of FlashInfer's: "auto" serves the call, logs the reason once, the result is right."""

# SPDX-License-Identifier: Apache-2.0
import functools
import logging

import pytest
import torch
from assertions import assert_bitwise
from refused_calls import OPERATIONS, TABLES, Refused, calls

from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.kernels import backends
from nvfp4_moe.kernels.backends import Backend, Operation, UnsupportedError
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.kernels.flashinfer.rules import first_reason

pytestmark = pytest.mark.interpreter


@functools.cache
def examples(table: str) -> dict[int, Refused]:
    """The first call that each rule of a table refuses, by the rule's place."""
    found: dict[int, Refused] = {}
    for each in calls(table):
        with pytest.MonkeyPatch.context() as patch:
            call = each.call(patch)
            for place, rule in enumerate(TABLES[table]):
                if version.HERE.described_as in rule.versions and rule.refuses(call):
                    found.setdefault(place, each)
                    break
    return found


def forbidden(call):
    raise AssertionError("FlashInfer was to refuse this call")


def beside_ours(table: str) -> Operation:
    """The operation with one backend of FlashInfer, and ours."""
    name, backend = table.split(" ", 1)
    ours = [row for row in OPERATIONS[name]._table.values() if not row.name.startswith("flash")]
    theirs = Backend(backend, lambda call: first_reason(TABLES[table], call), forbidden)
    return Operation(name, [theirs, *ours])


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_right(example: Refused, call, got, want) -> None:
    """The reference's bits, or within the intervals of the layer's call."""
    assert len(got) == len(want)
    if getattr(call, "do_finalize", True) is False:  # the order of the rows is each backend's
        (rows, weights, places), (rows_, weights_, places_) = got, want
        got, want = [rows[places.long()], weights], [rows_[places_.long()], weights_]
    if example.case is not None and len(got) == 1 and not example.case().exact:
        assert not Allowed(example.case()).wrong(got[0]).any()
        return
    for g, w in zip(got, want, strict=True):
        assert_bitwise(g, w, "auto")


@pytest.mark.parametrize(
    ("table", "place"),
    [pytest.param(t, i, id=f"{t} {i}") for t, rules in TABLES.items() for i in range(len(rules))],
)
def test_auto_serves_what_flashinfer_refuses(table, place, monkeypatch, caplog):
    rule, example = TABLES[table][place], examples(table).get(place)
    assert example is not None, (
        f"{table}: no call of tests/support/refused_calls.py is refused by the rule "
        f"{rule.reason!r} ({rule.source or 'ours'}): add one"
    )
    call, operation = example.call(monkeypatch), beside_ours(table)
    backend = table.split(" ", 1)[1]
    reason = rule.text(call)
    backends.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "nvfp4_moe"):
        if example.served:
            assert operation.resolve(call, "auto") in ("triton", "reference")
        else:
            with pytest.raises(UnsupportedError, match="no backend can serve this call"):
                operation.resolve(call, "auto")
        if example.runs:
            got = tensors(operation.serve(call, "auto"))
    told = [r.getMessage() for r in caplog.records if f": {backend} cannot" in r.getMessage()]
    line = f"{operation.name}: {backend} cannot serve, falling back: {reason}"
    assert told == ([line] if example.logged else [])
    if example.runs:
        want = tensors(OPERATIONS[operation.name].run("reference", call))
        assert_right(example, call, got, want)


@pytest.mark.parametrize("table", TABLES)
def test_every_call_is_for_a_rule(table):
    """A call that no rule refuses, or whose rule another call is for, would say nothing."""
    for each in calls(table):
        with pytest.MonkeyPatch.context() as patch:
            call = each.call(patch)
            assert first_reason(TABLES[table], call) is not None
