"""Patterns of modules mean what Python's own matchers say, in linear time, or are refused by name."""

# SPDX-License-Identifier: Apache-2.0
import random
import re
import time
import warnings

import pytest

from nvfp4_moe.checkpoints.patterns import LONGEST, matcher, matches

MODULES = (
    "lm_head",
    "model.layers.3.mlp.experts",
    "model.layers.3.mlp.experts.12.gate_proj",
    "model.layers.30.self_attn.q_proj",
    "model.visual.blocks.0",
)


@pytest.mark.parametrize(
    "expression",
    [
        ".*lm_head",
        "lm_head$",
        "^model\\.visual.*",
        ".*mlp.gate$",
        "model.layers.(?:3|30)\\..*",
        ".*\\.(q|k|v)_proj",
        "model\\.layers\\.([0-9]|[12]\\d)\\.",
        ".*experts(\\.\\d+)+\\.[a-z_]+?$",
        "[^.]{7}$",
        "",
    ],
)
def test_expressions_in_use(expression):
    for module in MODULES:
        expected = re.match(expression, module) is not None
        assert matches(f"re:{expression}", module) == expected


def test_names_and_wildcards():
    assert [m for m in MODULES if matches("lm_head", m)] == ["lm_head"]
    assert [m for m in MODULES if matches("model.layers.3*", m)] == list(MODULES[1:4])
    assert [m for m in MODULES if matches("*.[qk]_proj", m)] == [MODULES[3]]
    assert not any(matches("model.layers.3", m) for m in MODULES)


ATOMS = ("a", "b", ".", "\\.", "[ab]", "[^a]", "[]a]", "\\d", "\\w", "(?:a|b)")
ATOMS = (*ATOMS, "(ab|)", "(a*)", "^", "$", "{")
REPEATS = ("", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "{}", "{,}")


def expression(r: random.Random, depth: int = 0) -> str:
    """A random one, seldom wrong."""
    pieces = []
    for _ in range(r.randint(0, 4)):
        nested = depth < 3 and r.random() < 0.2
        piece = f"({expression(r, depth + 1)})" if nested else r.choice(ATOMS)
        pieces.append(piece + r.choice(REPEATS))
    tail = f"|{expression(r, depth + 1)}" if depth < 3 and r.random() < 0.15 else ""
    return "".join(pieces) + tail


def test_random_expressions_mean_what_python_s_matcher_says():
    r = random.Random(0)
    served = 0
    for _ in range(600):
        given = expression(r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = re.compile(given)
            except re.error:
                expected = None
        if expected is None:
            with pytest.raises(ValueError, match="it is no regular expression"):
                matcher(f"re:{given}")
            continue
        served += 1
        for _ in range(6):
            name = "".join(r.choice("ab.0") for _ in range(r.randint(0, 6)))
            assert matches(f"re:{given}", name) == bool(expected.match(name)), (given, name)
    assert served > 300


@pytest.mark.parametrize(
    "expression", ["(\\w+\\.?)+$!", "(a*)*b", "(.*a){200}", "(a?){200}a{200}", "(a|a)*b"]
)
def test_no_expression_takes_long(expression):
    name = "model.layers.0." + "a" * 400
    start = time.perf_counter()
    assert matches(f"re:{expression}", name) in (True, False)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:(", "it is no regular expression: missing \\), unterminated subpattern"),
        ("re:*a", "it is no regular expression: nothing to repeat"),
        ("re:(?!a)b", "'\\(\\?!a\\)b' at 0 is not served"),
        ("re:a\\b", "at 1 is not served"),
        ("re:(a)\\1", "at 3 is not served"),
        ("re:(?i)a", "at 0 is not served"),
        ("re:a{9999}", f"it repeats more than {LONGEST} times"),
        ("re:((a{99}){99}){99}", f"more than {LONGEST} states"),
        ("re:((){999}){999}", f"more than {LONGEST} states"),
        ("re:" + "(" * 60 + ")" * 60, "nested more than 20 deep"),
        ("*a" * LONGEST, "it has 2000 characters"),
    ],
)
def test_what_is_not_served_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        matcher(pattern)
