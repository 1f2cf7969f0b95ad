"""JSON of files that are not trusted, read in bounded time or refused with the reason.

UTF-8 whatever the locale, with or without a byte order mark. Refused: more than 100 MB (the bound
that safetensors has for its headers), more than 64 levels, an object that has a name twice, an
integer of more than 400 digits, half of a surrogate pair (which no file or terminal can take).
`Infinity` and `NaN` are read as Python's writer leaves them: configurations have them
(`time_step_limit` of Mamba layers).
"""

# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

MOST_BYTES = 100_000_000
DEEPEST = 64
_MOST_DIGITS = 400
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse(content: bytes | str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, or is beyond a bound above.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content)} bytes; at most {MOST_BYTES} are read")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8: {e.reason} at byte {e.start}") from None
    _check_depth(text)
    value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    if _HALF.search(text):
        for string in _strings(value):
            if not _encodes(string):
                raise ValueError(f"it has half of a surrogate pair, in {json.dumps(string[:40])}")
    return value


def _check_depth(text: str) -> None:
    # Before parsing: a caller may have raised the interpreter's limit beyond what its stack takes.
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for match in _TOKEN.finditer(text):
        token = text[match.start()]
        if token in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        elif token in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has {json.dumps(twice[:80])} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits; at most {_MOST_DIGITS} are read")
    return int(digits)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)


def _encodes(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
