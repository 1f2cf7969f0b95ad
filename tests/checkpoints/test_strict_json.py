"""JSON that is not trusted is read to the same value as Python's, or refused with the reason."""

# SPDX-License-Identifier: Apache-2.0
import json
import math
import sys

import pytest

from nvfp4_moe.strict_json import DEEPEST, parse

NESTED = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, 'b\n\\"[{', None, True, {"": {}}], "ü": "\U0001f600]"},
        [10**30, 1e-300, [[]] * 200],
        "[" * 200,
    ],
)
def test_the_value_is_python_s(value):
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode("utf-8-sig")) == value


def test_infinity_and_nan_of_a_configuration():
    low, high, nan = parse("[-Infinity, Infinity, NaN]")
    assert low == -math.inf and high == math.inf and math.isnan(nan)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1}}', "Extra data"),
        (b'"\xff"', "not UTF-8: invalid start byte at byte 1"),
        (NESTED, f"more than {DEEPEST} levels deep"),
        ("[" * 10**6, f"more than {DEEPEST} levels deep"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', 'an object has "c" twice'),
        ("[" + "9" * 5000 + "]", "an integer has 5000 digits"),
        ('["\\ud800"]', 'half of a surrogate pair, in "\\\\ud800"'),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ('"' + "\\" * 10**6, "Unterminated string"),
    ],
)
def test_the_rest_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse(content)


def test_depth_is_bounded_whatever_the_interpreter_allows():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(ValueError, match="levels deep"):
            parse(NESTED)
    finally:
        sys.setrecursionlimit(limit)


def test_the_deepest_that_is_read():
    assert parse("[" * DEEPEST + "]" * DEEPEST) is not None
    with pytest.raises(ValueError, match="levels deep"):
        parse("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))
