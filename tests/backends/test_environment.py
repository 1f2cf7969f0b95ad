"""Our reading of the environment agrees with FlashInfer's own."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import itertools
import os
import re
from pathlib import Path

import pytest

from nvfp4_moe.kernels import environment
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

NEW, OLD = environment.EXACT_VARIABLES["cuda"]
SWITCH, ERR_MODE, ERR_FAST, USE_256 = environment.FOUR_OVER_SIX_VARIABLES

OWN_CACHE, XDG_CACHE = environment.CACHE_VARIABLES


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def flashinfer_file(path: str) -> str:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flashinfer-python is not installed")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        pytest.skip(f"this flashinfer-python has no {path}")
    return file.read_text()


@pytest.mark.parametrize(
    ("new", "old", "cuda", "cute_dsl"),
    [
        (None, None, "fast", "fast"),
        ("1", None, "exact", "exact"),
        (None, "1", "exact", "fast"),
        ("1", "1", "exact", "exact"),
        ("0", None, "fast", "fast"),
        ("", "", "fast", "fast"),
        ("true", "yes", "fast", "fast"),
        ("11", "1 ", "fast", "fast"),
    ],
)
def test_math(monkeypatch, new, old, cuda, cute_dsl):
    for name, value in ((NEW, new), (OLD, old)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.math("cuda") == cuda
    assert environment.math("cute-dsl") == cute_dsl


@pytest.mark.parametrize("build", ["cuda", "cute-dsl"])
@pytest.mark.parametrize("wanted", ["fast", "exact"])
@pytest.mark.parametrize("on", [(), (NEW,), (OLD,), (NEW, OLD)])
def test_how_to_get_works_when_followed(monkeypatch, build, wanted, on):
    for name in on:
        monkeypatch.setenv(name, "1")
    if environment.math(build) == wanted:
        return
    advice = environment.how_to_get(wanted, build)
    if advice.startswith("set "):
        monkeypatch.setenv(*advice.removeprefix("set ").split("="))
    else:
        for name in advice.removeprefix("unset ").split(" and "):
            monkeypatch.delenv(name)
    assert environment.math(build) == wanted


def test_variables_are_those_of_flashinfer_cuda():
    source = flashinfer_file("data/csrc/nv_internal/cpp/common/envUtils.cpp")
    body = re.search(r"bool getEnvDisableFP4QuantFastMath\(\) \{(.*?)\}", source, re.S)
    assert body, "getEnvDisableFP4QuantFastMath is gone from FlashInfer's envUtils.cpp"
    assert (
        tuple(re.findall(r'getBoolEnv\("(\w+)"\)', body[1])) == environment.EXACT_VARIABLES["cuda"]
    )
    rule = re.search(r"static bool getBoolEnv\(.*?\{(.*?)\}", source, re.S)
    assert rule and "env[0] == '1' && env[1] == '\\0'" in rule[1], "what counts as on has changed"


def test_variables_are_those_of_flashinfer_cute_dsl():
    source = flashinfer_file("quantization/kernels/nvfp4_quantize.py")
    names = set(re.findall(r'"(\w*DISABLE_FP4_QUANT_FAST_MATH)"', source))
    assert names == set(environment.EXACT_VARIABLES["cute-dsl"])


def test_four_over_six_equals_flashinfers_reading(monkeypatch):
    utils = pytest.importorskip(
        "flashinfer.quantization.nvfp4_quantization_utils", reason="needs flashinfer-python"
    )
    values = {
        SWITCH: (None, "1", "0"),
        ERR_MODE: (None, "MAE", "mse"),
        ERR_FAST: (None, "1", "true"),
        USE_256: (None, "1", ""),
    }
    on = 0
    for combination in itertools.product(*values.values()):
        for name, value in zip(values, combination, strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        theirs = utils.current_nvfp4_4over6_config()
        expected = None if theirs is None else NVFP44Over6Config.of(theirs)
        assert environment.four_over_six() == expected, combination
        on += expected is not None
    assert on == 27


@pytest.mark.parametrize("mode", ["", "MAX", "0"])
def test_bad_error_mode_names_the_variable(monkeypatch, mode):
    monkeypatch.setenv(ERR_MODE, mode)
    assert environment.four_over_six() is None  # read only where 4over6 is on
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(ValueError, match=rf"{ERR_MODE} is '{mode}'; it must be MAE or MSE"):
        environment.four_over_six()


def test_sources_name_what_came_from_the_environment(monkeypatch):
    exact = Recipe("exact", NVFP44Over6Config())
    assert environment.sources(exact, math=True, config=False) == ""
    monkeypatch.setenv(OLD, "1")
    assert environment.sources(exact, math=True, config=True) == f"{OLD} and {SWITCH}"
    assert environment.sources(exact, math=False, config=True) == SWITCH
    assert environment.sources(Recipe("exact"), math=True, config=True) == OLD
    assert environment.sources(Recipe("exact", build="cute-dsl"), math=True, config=True) == ""


OURS, SGLANGS = environment.SWITCH_VARIABLES


@pytest.mark.parametrize(
    ("values", "on"),
    [
        ({}, False),
        ({OURS: "", SGLANGS: ""}, False),
        ({OURS: "1"}, True),
        ({SGLANGS: "1"}, True),
        ({SGLANGS: "True"}, True),
        ({OURS: "YES", SGLANGS: "y"}, True),
        ({OURS: "0"}, False),
        ({SGLANGS: "no"}, False),
        ({OURS: "FALSE", SGLANGS: "N"}, False),
        ({OURS: "", SGLANGS: "1"}, True),
    ],
)
def test_the_switch(monkeypatch, values, on):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert environment.per_token_activation() is on


@pytest.mark.parametrize("name", [OURS, SGLANGS])
@pytest.mark.parametrize("value", ["on", "2", " 1", "1 ", "None", "truee"])
def test_a_switch_that_is_no_boolean_is_an_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"{name} is '{value}'; it must be one of true, 1, yes"):
        environment.per_token_activation()


@pytest.mark.parametrize(("ours", "theirs"), [("1", "0"), ("no", "yes")])
def test_switches_that_disagree_are_an_error(monkeypatch, ours, theirs):
    monkeypatch.setenv(OURS, ours)
    monkeypatch.setenv(SGLANGS, theirs)
    with pytest.raises(
        ValueError, match=rf"{OURS} is '{ours}' and {SGLANGS} is '{theirs}'; they must agree"
    ):
        environment.per_token_activation()


@pytest.mark.parametrize(
    ("own", "xdg", "home", "folder"),
    [
        ("/a/b", "/x", "/h", "/a/b"),
        ("cache", None, "/h", "cache"),
        ("", "/x", "/h", "/x/nvfp4-moe"),
        (None, "/x", "/h", "/x/nvfp4-moe"),
        (None, "x", "/h", "/h/.cache/nvfp4-moe"),
        (None, "", "/h", "/h/.cache/nvfp4-moe"),
        (None, None, "/h", "/h/.cache/nvfp4-moe"),
    ],
)
def test_cache_folder(monkeypatch, own, xdg, home, folder):
    for name, value in ((OWN_CACHE, own), (XDG_CACHE, xdg), ("HOME", home)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.cache_folder() == Path(folder)


def test_no_home_is_no_cache_folder(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", home)
    assert environment.cache_folder() is None


def test_nothing_else_reads_or_writes_the_environment(monkeypatch):
    root = Path(environment.__file__).parent
    users = [
        p.name
        for p in root.glob("*.py")
        if re.search(r"os\.(environ|getenv|putenv)", p.read_text())
    ]
    assert users == ["environment.py"]
    monkeypatch.setenv(NEW, "1")
    before = dict(os.environ)
    assert environment.snapshot() == {n: "1" if n == NEW else None for n in environment.VARIABLES}
    environment.math("cuda"), environment.how_to_get("fast", "cuda"), environment.four_over_six()
    environment.per_token_activation()
    assert dict(os.environ) == before
