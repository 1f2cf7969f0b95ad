"""Types of JSON values, as data, and everything in a value that does not fit them.

A problem names the entry (`quantization.exclude_modules[2]`), what was found, and what is allowed.
Plain Python, since the package runs from a checkout on images that have torch and Triton alone.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_LONGEST = 60
_PLAIN = re.compile(r"[\w.*-]{1,120}")


class Schema(Protocol):
    """A type; `allowed` completes the sentence "it must be"."""

    @property
    def allowed(self) -> str: ...

    def problems(self, path: str, value: Any) -> Iterator[str]:
        """One line for each entry, at `path` or below, of another type."""
        ...


def shown(value: Any) -> str:
    """Write a JSON value for a message: short, and in ASCII."""
    if isinstance(value, dict | list) and value:
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    if isinstance(value, str) and len(value) > _LONGEST:
        return f'{json.dumps(value[:_LONGEST])[:-1]}..." ({len(value)} characters)'
    text = json.dumps(value)
    return text if len(text) <= 6 * _LONGEST else f"{text[:_LONGEST]}..."


def wrong(path: str, value: Any, allowed: str) -> str:
    """Write a problem in its one wording."""
    return f"{path or 'it'} is {shown(value)}; it must be {allowed}"


@dataclass(frozen=True)
class Leaf:
    """A value that is taken as a whole."""

    allowed: str
    fits: Callable[[Any], bool]

    def problems(self, path: str, value: Any) -> Iterator[str]:
        if not self.fits(value):
            yield wrong(path, value, self.allowed)


@dataclass(frozen=True)
class ListOf:
    """An array, of any length or of `exactly` so many items."""

    item: Schema
    exactly: int | None = None

    @property
    def allowed(self) -> str:
        of = "" if self.exactly is None else f" of {self.exactly}"
        return f"an array{of}, each item {self.item.allowed}"

    def problems(self, path: str, value: Any) -> Iterator[str]:
        if not isinstance(value, list) or self.exactly not in (None, len(value)):
            yield wrong(path, value, self.allowed)
            return
        for i, item in enumerate(value):
            yield from self.item.problems(f"{path}[{i}]", item)


@dataclass(frozen=True)
class MapOf:
    """An object with names that the checkpoint chooses, `at_least` so many."""

    item: Schema
    at_least: int = 0

    @property
    def allowed(self) -> str:
        least = f" with at least {self.at_least}" if self.at_least else ""
        return f"an object{least}, each value {self.item.allowed}"

    def problems(self, path: str, value: Any) -> Iterator[str]:
        if not isinstance(value, dict) or len(value) < self.at_least:
            yield wrong(path, value, self.allowed)
            return
        for name, item in value.items():
            yield from self.item.problems(_below(path, name), item)


@dataclass(frozen=True)
class Record:
    """An object with known entries, each of which may be left out; of others nothing is said."""

    entries: Mapping[str, Schema]
    required: tuple[str, ...] = ()
    allowed: str = "an object"

    def problems(self, path: str, value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield wrong(path, value, self.allowed)
            return
        for name in self.required:
            if name not in value:
                yield f"{_below(path, name)} is missing; it must be {self.entries[name].allowed}"
        for name, schema in self.entries.items():
            if name in value:
                yield from schema.problems(_below(path, name), value[name])


@dataclass(frozen=True)
class OrNull:
    """A value or null, which means that there is none."""

    schema: Schema

    @property
    def allowed(self) -> str:
        return f"{self.schema.allowed}, or null"

    def problems(self, path: str, value: Any) -> Iterator[str]:
        if value is not None:
            yield from self.schema.problems(path, value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


ANY = Leaf("any value", lambda value: True)
STRING = Leaf("a string", lambda value: isinstance(value, str))
BOOLEAN = Leaf("true or false", lambda value: isinstance(value, bool))
WHOLE = Leaf("a whole number from 0 to 2**31 - 1", _is_whole)
COUNT = Leaf("a whole number from 1 to 2**31 - 1", lambda value: _is_whole(value) and value > 0)
NUMBER = Leaf(
    "a finite number",
    lambda value: type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value),
)
SIZE = Leaf(
    "a whole number from 1 to 2**31 - 1, or one as a string",
    lambda value: (
        COUNT.fits(value)
        or (isinstance(value, str) and re.fullmatch("[1-9][0-9]{0,8}", value) is not None)
    ),
)


def _below(path: str, name: str) -> str:
    tail = name if _PLAIN.fullmatch(name) else shown(name)
    return f"{path}.{tail}" if path else tail
