"""A few hundred English sentences that every Python has: its own documentation."""

# SPDX-License-Identifier: Apache-2.0
import hashlib
import platform
import re
from collections.abc import Sequence
from pydoc_data import topics


def sentences() -> tuple[list[str], list[str]]:
    """(evaluated, calibrated on): English sentences of Python's own documentation.

    Every second topic is for calibration, so that the two share neither text nor subject.
    """
    evaluated: dict[str, None] = {}
    calibration: dict[str, None] = {}
    for i, name in enumerate(sorted(topics.topics)):
        found = dict.fromkeys(sentences_of(topics.topics[name]))
        (evaluated if i % 2 else calibration).update(found)
    return list(evaluated), [s for s in calibration if s not in evaluated]


def sentences_of(text: str) -> list[str]:
    """The sentences of 8 to 40 words in the paragraphs that are prose: not indented, not code."""
    found = []
    for paragraph in text.split("\n\n"):
        if re.search(r"^\s", paragraph, re.MULTILINE):
            continue
        prose = paragraph.replace("-\n", "-").replace("\n", " ")
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", prose):
            plain = re.fullmatch("""[A-Z][A-Za-z0-9 ,;:()"“”'\u2019/.-]*[.?!]""", sentence)
            if plain and 8 <= len(sentence.split()) <= 40:
                found.append(sentence)
    return found


def origin(texts: tuple[Sequence[str], Sequence[str]]) -> str:
    """A line that identifies the sentences, which differ a little between versions of Python."""
    digest = hashlib.sha256("\n".join(texts[0]).encode()).hexdigest()[:16]
    return (
        f"{len(texts[0])} sentences, calibration on {len(texts[1])} others, of Python "
        f"{platform.python_version()}'s documentation (SHA-256 {digest}...)"
    )
