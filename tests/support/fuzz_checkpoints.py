"""Damaged checkpoints and replay files: each is read, or refused with the documented error, in time.

    PYTHONPATH=.:tests python tests/support/fuzz_checkpoints.py [--runs 100000] [--seed 0]

A run damages files of a small checkpoint (values and bytes of JSON, headers and bytes of shards, kinds
of files, names, an unfinished destination), and loads or converts it. A fault is printed with its
seed, which `--seed N --runs 1` runs again; the status is 1 if there was any. A run may take 5 seconds
of its process's time.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import (
    COMPRESSED_KINDS,
    MODELOPT_KINDS,
    NAMINGS,
    compressed_config,
    fp8,
    modelopt_config,
    nvfp4,
    ordinary,
    quantized,
    weights,
    write,
)
from replay_cases import moe_failure, quantizer_failure

from nvfp4_moe.checkpoints import CheckpointError, Folder, convert, find_layers, load_experts
from nvfp4_moe.checkpoints.resumable_writer import RECORD
from nvfp4_moe.failures.replay_file import ReplayFileError, load, save_moe, save_quantizer

SECONDS = 5.0
BLOCKED = 300.0
"""Seconds after which a process that cannot be stopped ends."""
SIZES = (32, 16)
DTYPES = ("BF16", "F32", "F64", "U8", "I8", "F4", "F6_E2M3", "F8_E4M3", "C64", "X")
FAILURE = "failure.safetensors"
Files = dict[str, bytes]


class TookTooLong(BaseException):
    """A run was stopped."""


@dataclass
class Tally:
    """The results of the runs; `faults` have a seed and a traceback each."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)


def bases(folder: Path) -> dict[str, Files]:
    """Sound checkpoints and files to replay, by name."""
    w, parts = weights(sizes=SIZES), quantized(weights(sizes=SIZES))
    apart, stacked = NAMINGS["qwen3-moe"], NAMINGS["stacked"]
    config = dict(apart.config)
    packed = config | {"quantization_config": compressed_config("re:.*gate$", "lm_head")}
    blocks = config | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    modelopt = nvfp4(apart, 0, parts, MODELOPT_KINDS)
    compressed = nvfp4(apart, 0, parts, COMPRESSED_KINDS)
    made = {
        "bf16": write(folder / "bf16", [ordinary(apart, 0, w)], config),
        "stacked": write(
            folder / "st", [ordinary(stacked, 0, w)], dict(stacked.config), index=False
        ),
        "fp8": write(folder / "fp8", [fp8(apart, 0, w)[0]], blocks, index=False),
        "modelopt": write(folder / "mo", [modelopt], config, hf_quant_config=modelopt_config()),
        "compressed-tensors": write(folder / "ct", [compressed], packed, index=False),
    }
    found = {name: contents(path) for name, path in made.items()}
    for kind, save, failure in (
        ("quantizer", save_quantizer, quantizer_failure()),
        ("layer", save_moe, moe_failure()),
    ):
        place = folder / kind
        place.mkdir()
        save(place / FAILURE, failure)
        found[f"replay of a {kind}"] = contents(place)
    return found


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(r: random.Random) -> Any:
    """A value that seldom fits."""
    deep: Any = 1
    for _ in range(r.choice((3, 60, 70, 300))):
        deep = [deep]
    return r.choice(
        (
            None,
            True,
            0,
            -1,
            3,
            16,
            2**31,
            2**63,
            10**30,
            10**399,
            1.5,
            float("nan"),
            float("inf"),
            1e308,
            "",
            "4",
            "16",
            "NVFP4",
            "FP8",
            "MIXED_PRECISION",
            "compressed-tensors",
            "modelopt",
            "silu",
            "*",
            "[",
            "re:(",
            "re:(a*)*b",
            "re:(\\w+\\.?)+$!",
            "re:.*",
            "re:(?=a)",
            "re:((a{99}){99}){99}",
            "[!a-",
            "\ud800",
            "\0",
            "é",
            "x" * 2000,
            "../x.safetensors",
            "/dev/zero",
            "model.safetensors",
            "Linear",
            [],
            {},
            [None],
            [[]],
            [1, "a"],
            ["*"] * 50,
            {"a": None},
            {"weights": None},
            [128, 128],
            [0, 0],
            deep,
        )
    )


KEYS = (
    "quantization",
    "quantization_config",
    "quant_algo",
    "quant_method",
    "exclude_modules",
    "ignore",
    "format",
    "quantized_layers",
    "config_groups",
    "group_size",
    "targets",
    "weights",
    "num_bits",
    "type",
    "producer",
    "num_experts",
    "n_routed_experts",
    "hidden_act",
    "text_config",
    "swiglu_limit",
    "model_type",
    "metadata",
    "architectures",
    "hidden_size",
    "weight_block_size",
    "apply_router_weight_on_input",
    "kind",
    "mode",
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    found, pending = [], [value]
    while pending:
        item = pending.pop()
        keys = (
            item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        for key in list(keys)[:200]:
            found.append((item, key))
            pending.append(item[key])
    return found


def damage_value(r: random.Random, value: Any) -> Any:
    """Replace, remove or add something in a JSON value."""
    inside = places(value)
    if not inside or r.random() < 0.03:
        return values(r)
    container, key = r.choice(inside)
    how = r.random()
    if how < 0.6:
        container[key] = values(r)
    elif how < 0.75:
        del container[key]
    elif isinstance(container, dict):
        name = r.choice((*KEYS, "a.b", str(r.choice((5, 999999, 10**9, "9" * 400)))))
        if how < 0.85:
            container[name] = values(r)
        else:
            container[f"{key}"[:30] + name if r.random() < 0.5 else name] = container.pop(key)
    return value


def damage_bytes(r: random.Random, content: bytes) -> bytes:
    at = r.randrange(len(content) + 1)
    cut = r.choice((1, 2, 8, 100, len(content)))
    junk = r.choice(
        (b"", b"\0", b"\xff", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\xef\xbb\xbf", r.randbytes(8))
    )
    return content[:at] + junk + content[at + cut * r.randrange(2) :]


def damage_shard(r: random.Random, content: bytes) -> bytes:
    """Damage the header of a safetensors file, its length, or any byte."""
    size = struct.unpack("<Q", content[:8])[0]
    if r.random() < 0.3:
        return damage_bytes(r, content)
    if r.random() < 0.15:
        return (
            struct.pack("<Q", r.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)))
            + content[8:]
        )
    header, how = json.loads(content[8 : 8 + size]), r.random()
    entries = [name for name in header if name != "__metadata__"]
    name = r.choice(entries)
    entry, other = header[name], header[r.choice(entries)]
    if how < 0.25:
        entry["dtype"] = r.choice(DTYPES)
    elif how < 0.45:
        shapes = ([], [0], [1], [2**40, 0], [2**62, 4], [-1], entry["shape"][::-1])
        entry["shape"] = r.choice(shapes)
    elif how < 0.55:
        entry["data_offsets"] = r.choice(([0, 0], [1, 0], [0, 2**60], other["data_offsets"]))
    elif how < 0.8:
        number = r.choice(
            ("0", "3", "5", "07", "999999", "9" * 30, "9" * 5000, "\u0663", "é", "\n")
        )
        old = r.choice(name.split("."))
        renamed = name.replace(old, number, 1) if r.random() < 0.7 else number + name
        header[renamed] = header.pop(name)
    elif "nvfp4_moe" in header.get("__metadata__", {}):
        facts = damage_value(r, json.loads(header["__metadata__"]["nvfp4_moe"]))
        header["__metadata__"]["nvfp4_moe"] = json.dumps(facts)
    else:
        header = damage_value(r, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def damage(r: random.Random, files: Files) -> None:
    """Damage one file of a checkpoint."""
    name = r.choice(sorted(files))
    try:
        if name.endswith(".safetensors"):
            files[name] = damage_shard(r, files[name])
        elif r.random() < 0.2:
            files[name] = damage_bytes(r, files[name])
        else:
            files[name] = json.dumps(damage_value(r, json.loads(files[name]))).encode()
    except (ValueError, LookupError, TypeError, struct.error, RecursionError):  # damaged before
        files[name] = damage_bytes(r, files[name])


KINDS = (
    os.mkfifo,
    os.mkdir,
    lambda path: os.symlink("nowhere", path),
    lambda path: os.symlink("/dev/zero", path),
    lambda path: os.symlink("/etc/hostname", path),
    lambda path: os.symlink("config.json", path),
    lambda path: Path(path).write_bytes(b""),
)


def lay_out(r: random.Random, files: Files, folder: Path) -> None:
    """Write the files, one of them perhaps of another kind or under another name."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if r.random() < 0.15:
        name = r.choice(
            (*files, "z.safetensors", "hf_quant_config.json", "params.json", "extra.txt")
        )
        (folder / name).unlink(missing_ok=True)
        r.choice(KINDS)(folder / name)


def run(base: str, files: Files, r: random.Random, folder: Path) -> None:
    source, destination = folder / "source", folder / "destination"
    source.mkdir()
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        damage(r, files)
    lay_out(r, files, source)
    if FAILURE in files:
        load(source / FAILURE)
        return
    find_layers(Folder(source))
    if base in ("modelopt", "compressed-tensors") and r.random() < 0.9:
        load_experts(source, 0, static=r.random() < 0.3)
        return
    if r.random() < 0.1:
        destination.mkdir()
        record = {
            "identity": "a",
            "names": ["model.safetensors"],
            "shards": {"m": {"sha256": "a", "facts": {}}},
        }
        (destination / RECORD).write_text(json.dumps(damage_value(r, record)))
    convert(source, destination)
    load_experts(destination, 0)  # a result is whole


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Stop what takes too long of this process's time; end the process where that cannot be."""

    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, stop)
    faulthandler.dump_traceback_later(BLOCKED, exit=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def fuzz(seeds: range, verbose: bool = False) -> Tally:
    """Run each seed."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        whole = bases(Path(place))
        for seed in seeds:
            r = random.Random(seed)
            base = r.choice(sorted(whole))
            folder = Path(place) / "run"
            folder.mkdir()
            try:
                with limited():
                    run(base, dict(whole[base]), r, folder)
                tally.outcomes[f"{base}: accepted"] += 1
            except (CheckpointError, ReplayFileError) as e:
                str(e).encode()
                tally.outcomes[f"{base}: refused"] += 1
            except (Exception, TookTooLong) as e:
                tally.outcomes[f"{base}: {type(e).__name__}"] += 1
                tally.faults.append((seed, traceback.format_exc()))
                if verbose:
                    print(f"--- seed {seed}\n{tally.faults[-1][1]}", flush=True)
            shutil.rmtree(folder)
            if verbose and (seed + 1) % 5000 == 0:
                print(f"seed {seed}: {len(tally.faults)} faults", flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.fsync = lambda number: None  # type: ignore[assignment]  # the machine stays on
    tally = fuzz(range(options.seed, options.seed + options.runs), verbose=True)
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"{count:8} {outcome}")
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
