"""Tuned configurations on disk: what is kept is found again, and nothing else ever is."""

# SPDX-License-Identifier: Apache-2.0
import json
import logging
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from paths import ROOT

from nvfp4_moe.kernels import environment
from nvfp4_moe.kernels.gemm_config import GemmConfig
from nvfp4_moe.kernels.moe.autotune import cache
from nvfp4_moe.kernels.moe.autotune.cache import Key, lookup, path_of, store, text_of

KEY = Key(
    "NVIDIA H100", 90, "3.6.0", "0123", 2048, 768, 128, 8, "Swiglu", "per-token", "gemm1_bias", 1024
)
CONFIGS = (GemmConfig(128, 32, 256, 3, 4), GemmConfig(64, 32, 128, 4, 8))
OTHERS = (GemmConfig(256, 64, 64, 3, 8, decoded=True), GemmConfig(128, 64, 128, 2, 4))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty cache, of a process that has looked nothing up yet."""
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_known", {})
    return tmp_path / "cache"


def forget() -> None:
    """As a process does that ends."""
    cache._known.clear()


def write(content: bytes | str, key: Key = KEY) -> None:
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    forget()


def checked(**changes) -> str:
    """An entry with other content and the check sum of that."""
    entry = json.loads(text_of(KEY, CONFIGS)) | changes
    del entry["check"]
    return json.dumps(entry | {"check": cache._check(entry)})


def assert_a_miss_with_one_line(caplog, reason: str) -> None:
    with caplog.at_level(logging.INFO, "nvfp4_moe"):
        assert lookup(KEY) is None
        assert lookup(KEY) is None
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0] and "\n" not in caplog.messages[0]
    store(KEY, CONFIGS)
    forget()
    assert lookup(KEY) == CONFIGS


def test_what_is_stored_is_found_by_another_process(folder):
    assert lookup(KEY) is None
    file = store(KEY, CONFIGS)
    forget()
    assert lookup(KEY) == CONFIGS
    assert [file] == [p for p in folder.rglob("*") if p.is_file()]
    store(KEY, OTHERS)
    forget()
    assert lookup(KEY) == OTHERS


def test_an_ordinary_miss_says_nothing(caplog):
    with caplog.at_level(logging.DEBUG, "nvfp4_moe"):
        assert lookup(KEY) is None
    assert caplog.messages == []


def test_a_file_is_read_once():
    assert lookup(KEY) is None
    path_of(KEY).parent.mkdir(parents=True)
    path_of(KEY).write_text(text_of(KEY, CONFIGS))
    assert lookup(KEY) is None  # the miss is remembered
    forget()
    assert lookup(KEY) == CONFIGS
    path_of(KEY).unlink()
    assert lookup(KEY) == CONFIGS


@pytest.mark.parametrize("name", [f.name for f in fields(Key)])
def test_every_field_makes_another_entry(name, caplog):
    other = {"activation": "Geglu", "mode": "static"}
    value = getattr(KEY, name)
    key = replace(KEY, **{name: value * 2 if isinstance(value, int) else other.get(name, "3.6.1")})
    store(KEY, CONFIGS)
    forget()
    assert lookup(key) is None
    store(key, CONFIGS[::-1])
    forget()
    assert lookup(KEY) == CONFIGS and lookup(key) == CONFIGS[::-1]
    write(text_of(KEY, CONFIGS), key)  # a file that was copied
    assert lookup(key) is None
    assert "another key" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        (text_of(KEY, CONFIGS)[:-40], "Unterminated"),
        (bytes(range(256)), "utf-8"),
        (b"\0" * 300, "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "not an entry"),
        ("null", "not an entry"),
        ("{}", "not an entry"),
        (text_of(KEY, CONFIGS).replace('"bm": 128', '"bm": 256'), "check sum"),
        (text_of(KEY, CONFIGS).replace('"check"', '"cheek"'), "check sum"),
        (checked(format=0), "not an entry"),
        (checked(gemm1=None), "no configuration"),
        (checked(gemm2=[128, 16, 128, 4, 4, False]), "no configuration"),
        (checked(gemm1={"bm": 128}), "no configuration"),
        (checked(gemm1=asdict(CONFIGS[0]) | {"more": 1}), "no configuration"),
    ],
    ids=lambda v: repr(v[:24]),
)
def test_damage_is_a_miss(content, reason, caplog):
    write(content)
    assert_a_miss_with_one_line(caplog, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bm": 48}, "bm is 48"),
        ({"bm": 16}, "bm is 16"),
        ({"bm": 512}, "bm is 512"),
        ({"bm": 0}, "bm is 0"),
        ({"bm": -64}, "bm is -64"),
        ({"bm": 128.0}, "no configuration"),
        ({"bm": "128"}, "no configuration"),
        ({"bm": None}, "no configuration"),
        ({"bn": 24}, "bn is 24"),
        ({"bn": 8}, "bn is 8"),
        ({"bn": 64}, "bn is 64 and 32"),
        ({"bk": 96}, "bk is 96"),
        ({"bk": 32}, "bk is 32"),
        ({"warps": 3}, "warps is 3"),
        ({"warps": 32}, "warps is 32"),
        ({"stages": 0}, "stages is 0"),
        ({"stages": 9}, "stages is 9"),
        ({"stages": True}, "no configuration"),
        ({"decoded": 1}, "no configuration"),
        ({"decoded": True, "bk": 512}, "decoded weights"),  # 768 columns are no multiple
    ],
    ids=str,
)
def test_what_the_kernel_cannot_run_is_a_miss(change, reason, caplog):
    second = change if "decoded" in change else {}
    first = {} if second else change
    write(checked(gemm1=asdict(CONFIGS[0]) | first, gemm2=asdict(CONFIGS[1]) | second))
    assert_a_miss_with_one_line(caplog, reason)


def test_decoded_weights_are_not_for_a_gpu_that_multiplies_codes():
    """Bf16 tokens are multiplied by values there too."""
    for mode, found in (("per-token", None), ("static", None), ("bf16", OTHERS)):
        key = replace(KEY, arch=100, mode=mode)
        store(key, OTHERS)
        forget()
        assert lookup(key) == found, mode


def test_places_that_cannot_be_used(folder, caplog, monkeypatch):
    """A file in the folder's place, a folder in the file's, no folder at all: tuning lasts a process."""
    path_of(KEY).mkdir(parents=True)
    assert lookup(KEY) is None
    assert store(KEY, CONFIGS) is None
    assert [p.name for p in path_of(KEY).parent.iterdir()] == [
        path_of(KEY).name
    ]  # nothing half done
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(folder / "file"))
    (folder / "file").write_text("")
    for known in (CONFIGS, None):
        assert lookup(KEY) == known
        forget()
    assert store(KEY, CONFIGS) is None
    assert lookup(KEY) == CONFIGS
    forget()

    monkeypatch.setattr(environment, "cache_folder", lambda: None)
    caplog.clear()
    assert lookup(KEY) is None
    assert not caplog.messages
    assert store(KEY, CONFIGS) is None
    assert lookup(KEY) == CONFIGS
    assert ["no home directory" in m for m in caplog.messages] == [True]


def test_using_is_for_a_while():
    for before in (None, CONFIGS):
        if before:
            store(KEY, before)
        with pytest.raises(RuntimeError), cache.using(KEY, OTHERS):
            assert lookup(KEY) == OTHERS
            raise RuntimeError
        assert lookup(KEY) == before
        forget()
        assert lookup(KEY) == before


WRITER = """
from nvfp4_moe.kernels.gemm_config import GemmConfig
from nvfp4_moe.kernels.moe.autotune.cache import *
import sys
key, first, second = eval(sys.stdin.read())
print("ready", flush=True)
for _ in range(400):
    assert store(key, (first, second))
"""


def test_two_processes_write_one_file(folder):
    store(KEY, CONFIGS)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for writer, configs in zip(writers, (CONFIGS, OTHERS), strict=True):
        writer.stdin.write(repr((KEY, *configs)))
        writer.stdin.close()
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    found = set()
    while any(writer.poll() is None for writer in writers):
        forget()
        found.add(lookup(KEY))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert found <= {CONFIGS, OTHERS} and found
    assert len(list(folder.rglob("*.*"))) == 1
    for writer in writers:
        writer.stdout.close()
