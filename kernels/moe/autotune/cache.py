"""Tiles of the grouped GEMMs that were measured on this machine, kept on disk.

Each `Key` has one JSON file, in `gemm/` under `environment.cache_folder()`. `search.py` writes it, and
`kernels/moe/launch.py` looks it up. A key holds everything that changes the machine code of the same
source, because compilers have turned single configurations into wrong results without an error. So an
entry serves only kernels that were compared with the table's when it was made. A process reads a file
once. Later look-ups, hits and misses, read a dictionary.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from ....reference.activation import ActivationType
from ....reference.weights.experts import Experts
from ... import environment, jit
from ...records import repeats
from ...tiles import GemmConfig
from ...triton_target import arch, gpu_name, native_mma
from .. import activation, grouped_gemm, hopper
from ..call import Mode
from ..hopper.config import CONFIGS
from ..tile_table import Config, Configs

_FORMAT = 1
"""Format of an entry, and what `launch.py` does with it; an entry of another number is a miss."""
_log = logging.getLogger("nvfp4_moe")


_POWERS = {"bm": (32, 256), "bn": (16, 256), "bk": (64, 512), "warps": (1, 16)}
_STAGES = range(1, 9)
_TYPES = {"bm": int, "bn": int, "bk": int, "stages": int, "warps": int, "decoded": bool}
_REGISTERS = (None, 80, 128, 168)


@dataclass(frozen=True)
class Key:
    """The facts on which a measurement depends."""

    gpu: str
    arch: int
    triton: str
    kernels: str  # digest of their source
    hidden: int  # padded, as in `Experts`
    intermediate: int
    experts: int  # local
    top_k: int
    activation: str
    mode: Mode
    optional: str  # names of the optional tensors of `Experts` that are not None
    slots: int  # local slots on average, rounded up to a power of two

    @property
    def weights(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (rows, columns) of the weights of each GEMM."""
        rows = self.intermediate * (2 if ActivationType[self.activation].gated else 1)
        return (rows, self.hidden), (self.hidden, self.intermediate)

    @property
    def native(self) -> bool:
        """Return True if the GPU multiplies codes."""
        return self.mode != "bf16" and native_mma(self.arch)


def key_of(experts: Experts, slots: int, top_k: int, mode: Mode) -> Key:
    """Return the key of a call with as many local slots (`configs.local_slots`)."""
    device = experts.gemm1_weights.device
    names = ("gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    return Key(
        gpu_name(device),
        arch(device),
        triton.__version__,
        _digest(),
        experts.padded_hidden_size,
        experts.padded_intermediate_size,
        experts.num_local,
        top_k,
        experts.activation.name,
        mode,
        " ".join(name for name in names if getattr(experts, name) is not None),
        triton.next_power_of_2(slots),
    )


@functools.cache
def _digest() -> str:
    """Hash the source of the kernel: a measurement or comparison holds for this source only."""
    folders = (jit, hopper)
    library = [p for f in folders for p in sorted(Path(f.__file__ or "").parent.glob("*.py"))]
    own = [Path(module.__file__ or "") for module in (activation, grouped_gemm)]
    sources = [path.read_bytes() for path in (*own, *library)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def refusal(config: GemmConfig, columns: int, *, native: bool) -> str | None:
    """Return why the kernel cannot run a configuration on weights of `columns`; None if it can.

    A None does not say that the tiles fit a multiprocessor, which only the GPU knows.
    """
    for name, (least, most) in _POWERS.items():
        value = getattr(config, name)
        if not least <= value <= most or value & (value - 1):
            return f"{name} is {value}; it must be a power of two from {least} to {most}"
    if config.stages not in _STAGES:
        return f"stages is {config.stages}; it must be {_STAGES[0]} to {_STAGES[-1]}"
    if config.registers not in _REGISTERS:
        return f"registers is {config.registers}; it must be one of {_REGISTERS}"
    if config.decoded and (native or columns % config.bk):
        return f"decoded weights need a bk that divides {columns} columns, and a GPU without NVFP4"
    return None


_known: dict[Key, Configs | None] = {}


def lookup(key: Key) -> Configs | None:
    """Return the tuned configurations; None if there is no entry, or if the entry is damaged."""
    try:
        return _known[key]
    except KeyError:
        found = _known[key] = _read(key)
        return found


def store(key: Key, configs: Configs) -> Path | None:
    """Keep configurations in this process and, if possible, on disk; return the file, or None.

    The file is replaced as a whole, so processes may write and read it at the same time.
    """
    _known[key] = configs
    repeats.forget()
    if (path := path_of(key)) is None:
        _log.warning("tuned configurations are not kept: no NVFP4_MOE_CACHE and no home directory")
        return None
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text_of(key, configs), "utf-8")
        temporary.replace(path)
    except OSError as error:
        _log.warning("tuned configurations are not kept: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return None
    return path


@contextlib.contextmanager
def using(key: Key, configs: Configs) -> Iterator[None]:
    """Run calls of this key with these configurations inside the block; write no file."""
    before = lookup(key)
    _known[key] = configs
    repeats.forget()
    try:
        yield
    finally:
        _known[key] = before
        repeats.forget()


def path_of(key: Key) -> Path | None:
    """Return the file of the entry; None without a cache folder."""
    folder = environment.cache_folder()
    name = hashlib.sha256(_json(asdict(key)).encode()).hexdigest()[:32]
    return None if folder is None else folder / "gemm" / f"{name}.json"


def text_of(key: Key, configs: Configs) -> str:
    """Return the text of an entry; `check` is a digest of the rest, which shows a changed digit."""
    content = {"format": _FORMAT, "key": asdict(key)}
    content |= {"gemm1": asdict(configs[0]), "gemm2": asdict(configs[1])}
    return json.dumps({**content, "check": _check(content)}, indent=1)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


def _read(key: Key) -> Configs | None:
    if (path := path_of(key)) is None:
        return None
    try:
        return _parse(path.read_text("utf-8"), key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("tuned configurations in %s are ignored: %s", path, error)
        return None


def _parse(text: str, key: Key) -> Configs:
    """Raises ValueError for what `text_of` did not write, or what the kernel cannot run."""
    entry = json.loads(text)
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        raise ValueError(f"not an entry of format {_FORMAT}")
    if entry.pop("check", None) != _check(entry):
        raise ValueError("its content does not fit its check sum")
    if entry.get("key") != asdict(key):
        raise ValueError("it is the entry of another key")
    first, second = (
        _config(entry.get(name), columns, native=key.native)
        for name, (_, columns) in zip(("gemm1", "gemm2"), key.weights, strict=True)
    )
    if first.bn != second.bn:
        raise ValueError(f"bn is {first.bn} and {second.bn}; the GEMMs of a call share it")
    return first, second


def _config(value: Any, columns: int, *, native: bool) -> Config:
    fields = dict(value) if isinstance(value, dict) else {}
    if "widths" in fields:
        for ring in CONFIGS:
            if json.loads(_json(asdict(ring))) == fields:
                return ring
        raise ValueError(f"{value!r} is no configuration")
    registers = fields.pop("registers", "missing")
    if {n: type(v) for n, v in fields.items()} != _TYPES or type(registers) is bool:
        raise ValueError(f"{value!r} is no configuration")
    config = GemmConfig(**fields, registers=registers)
    if (reason := refusal(config, columns, native=native)) is not None:
        raise ValueError(reason)
    return config
