"""Patterns of modules, matched in time linear in a module's name.

A pattern is a name; a name with the wildcards of a shell (`*`, `?`, `[...]`); or, after `re:`, a regular
expression that the name must begin with. Python's own matcher of these can take for ever on an
expression of a few characters, so that they are matched here by the set of states that an automaton
can be in. Look-around, references to groups, flags and `\\b` have no such automaton and are refused.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

LONGEST = 1000
"""The most characters of a pattern, and the most states of its automaton."""
_EXPRESSION = "re:"
_DEEPEST = 20
_TOKEN = re.compile(
    r"(?P<open>\((?:\?:)?(?!\?))|(?P<close>\))|(?P<bar>\|)|(?P<start>\^)|(?P<end>\$)"
    r"|(?P<repeat>[*+?]|\{(?!\})(?P<low>[0-9]*)(?P<comma>,?)(?P<high>[0-9]*)\})\??"
    r"|(?P<one>\[\^?\]?(?:\\.|[^\\\]])*\]|\\[dDwWsS]|\\[^0-9A-Za-z]|[^\\\[()])",
    re.DOTALL,
)


@functools.lru_cache(maxsize=10_000)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells if a pattern matches a module.

    Raises:
        ValueError: the pattern is no regular expression, or one that is not served.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; at most {LONGEST} are read")
    if pattern.startswith(_EXPRESSION):
        return _Automaton(pattern.removeprefix(_EXPRESSION)).begins
    if has_wildcard(pattern):
        return functools.partial(_fits, pattern)
    return pattern.__eq__


def matches(pattern: str, module: str) -> bool:
    """Return True if a pattern of `exclude_modules`, `ignore` or `targets` matches a module."""
    return matcher(pattern)(module)


def has_wildcard(pattern: str) -> bool:
    """Return True if a pattern can match more than one module."""
    return pattern.startswith(_EXPRESSION) or any(c in pattern for c in "*?[")


def _fits(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern)


@dataclass(eq=False, repr=False)
class _State:
    """A state of the automaton. A character of `one` leads to its only successor; no other does.

    `anchor` is "start" or "end" where only that place of the name lets through.
    """

    successors: list["_State"] = field(default_factory=list)
    one: Callable[[str], object] | None = None
    anchor: str = ""


@dataclass
class _Node:
    """A set of states that the automaton can be in at once, and what is known of its successors."""

    states: list[_State]
    accepts: bool
    accepts_at_end: bool
    successors: dict[str, "_Node"] = field(default_factory=dict)


class _Automaton:
    """A regular expression; its sets of states are made when names need them."""

    def __init__(self, expression: str):
        with warnings.catch_warnings():  # of syntax that may change its meaning one day
            warnings.simplefilter("ignore")
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as e:
                raise ValueError(f"it is no regular expression: {e}") from None
        self._tokens = list(_tokens(expression))
        self._at = 0
        self._count = 0
        self._accept = _State()
        self._nodes: dict[frozenset[int], _Node] = {}
        first = self._alternatives(0)(self._accept)
        self._first = self._node([first], at_start=True)

    def begins(self, name: str) -> bool:
        """Return True if the expression matches the beginning of a name."""
        node = self._first
        for c in name:
            if node.accepts or not node.states:
                return node.accepts
            if (after := node.successors.get(c)) is None:
                reached = [s.successors[0] for s in node.states if s.one is not None and s.one(c)]
                after = node.successors[c] = self._node(reached)
            node = after
        return node.accepts or node.accepts_at_end

    def _node(self, reached: list[_State], at_start: bool = False) -> _Node:
        key = frozenset(map(id, reached))
        if at_start or key not in self._nodes:
            states = self._closure(reached, {"start"} if at_start else set())
            at_end = self._closure(reached, {"start", "end"} if at_start else {"end"})
            node = _Node(
                [s for s in states if s.one is not None],
                any(s is self._accept for s in states),
                any(s is self._accept for s in at_end),
            )
            if at_start:
                return node
            self._nodes[key] = node
        return self._nodes[key]

    @staticmethod
    def _closure(reached: list[_State], places: set[str]) -> list[_State]:
        """Return the states that are reached without a character."""
        found = {id(s): s for s in reached}
        pending = list(reached)
        while pending:
            state = pending.pop()
            if state.one is None and (not state.anchor or state.anchor in places):
                for after in state.successors:
                    if id(after) not in found:
                        found[id(after)] = after
                        pending.append(after)
        return list(found.values())

    # A piece of the expression is a function: of the state that follows it, to its first state.

    def _alternatives(self, depth: int) -> "_Piece":
        if depth > _DEEPEST:
            raise ValueError(f"its groups are nested more than {_DEEPEST} deep")
        options = [self._sequence(depth)]
        while self._kind() == "bar":
            self._at += 1
            options.append(self._sequence(depth))
        if len(options) == 1:
            return options[0]
        return lambda after: self._state([piece(after) for piece in options])

    def _sequence(self, depth: int) -> "_Piece":
        pieces: list[_Piece] = []
        while (kind := self._kind()) not in ("", "bar", "close"):
            match = self._tokens[self._at]
            self._at += 1
            if kind == "open":
                pieces.append(self._alternatives(depth + 1))
                self._at += 1
            elif kind == "repeat":
                pieces[-1] = self._repeated(pieces[-1], match)
                if self._kind() == "repeat":
                    raise ValueError(f"{match[0]} is repeated itself, which is not served")
            elif kind == "one":
                pieces.append(functools.partial(self._one, _character(match[0])))
            else:
                pieces.append(functools.partial(self._anchored, kind))

        def piece(after: _State) -> _State:
            after = self._state([after])  # one at least, so that repeats of nothing are counted too
            for earlier in reversed(pieces):
                after = earlier(after)
            return after

        return piece

    def _repeated(self, piece: "_Piece", match: re.Match[str]) -> "_Piece":
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(match["repeat"], (0, None))
        if match["repeat"].startswith("{"):
            low = _bound(match["low"] or "0")
            high = _bound(match["high"]) if match["high"] else (None if match["comma"] else low)

        def repeated(after: _State) -> _State:
            first = after
            if high is None:
                first = self._state([after])
                first.successors.append(piece(first))
            for _ in range(0 if high is None else high - low):
                first = self._state([piece(first), after])
            for _ in range(low):
                first = piece(first)
            return first

        return repeated

    def _one(self, fits: Callable[[str], object], after: _State) -> _State:
        return self._state([after], one=fits)

    def _anchored(self, place: str, after: _State) -> _State:
        return self._state([after], anchor=place)

    def _state(self, successors: list[_State], **more: object) -> _State:
        self._count += 1
        if self._count > LONGEST:
            raise ValueError(f"its automaton has more than {LONGEST} states")
        return _State(successors, **more)  # type: ignore[arg-type]

    def _kind(self) -> str:
        """The kind of the next token; empty at the end."""
        return "" if self._at == len(self._tokens) else str(self._tokens[self._at].lastgroup)


_Piece = Callable[[_State], _State]


def _tokens(expression: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at : at + 8]!r} at {at} is not served")
        yield match
        at = match.end()


@functools.cache
def _character(token: str) -> Callable[[str], object]:
    """Return a test for the characters that a token of the expression matches."""
    if len(token) == 1 and token != ".":
        return token.__eq__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(token).fullmatch


def _bound(digits: str) -> int:
    if len(digits) > 4 or int(digits) > LONGEST:
        raise ValueError(f"it repeats more than {LONGEST} times")
    return int(digits)
