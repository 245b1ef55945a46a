"""Find a piece of code in a source, however the source is laid out, and whatever it calls its variables by now.

The library of mistakes quotes the specification. A quotation need not break when the specification is worded anew: line breaks,
comments, parentheses and quotes do not count, and a name that is gone from a function may have become another.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

WORD = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*|\\\n)
    | (?P<string>[rRbBfFuU]{0,2}(?:'{3}.*?'{3}|"{3}.*?"{3}|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"))
    | (?P<name>[^\W\d]\w*)
    | (?P<number>\d(?:[\w.]|(?<=[eE])[-+])*)
    | (?P<sign>\*\*=?|//=?|<<=?|>>=?|->|:=|[-+*/%@&|^=!<>]=?|[()\[\]{},:;.~`])""",
    re.VERBOSE | re.DOTALL,
)


class Word(NamedTuple):
    """A name, number, string or sign, and where it stands."""

    kind: str
    text: str
    start: int
    end: int


class Match(NamedTuple):
    """A piece of a source, and what the names of the quotation are there."""

    start: int
    end: int
    names: dict[str, str]


def replaced(source: str, before: str, after: str) -> str:
    """The source with ``after`` in the one place where ``before`` stands.

    >>> replaced("y = relu(x  @ w)  # R3", "relu(x @ w)", "x @ w")
    'y = x @ w  # R3'
    >>> replaced("def f(a, w):\\n    return relu(a @ w)", "return relu(x @ w)", "return x @ w")
    'def f(a, w):\\n    return a @ w'
    """
    if source.count(before) == 1:
        return source.replace(before, after)
    ways = ((source, before), (plain(source), before), (plain(source), plain(before)))
    for renaming in (False, True):
        for text, piece in ways:
            found = list(matches(text, piece, renaming=renaming))
            if len(found) == 1:
                start, end, names = found[0]
                return text[:start] + renamed(after, names, function_at(text, start), text) + text[end:]
    raise ValueError(f"{before!r} stands {source.count(before)} times there: a change names one place")


@cache
def plain(code: str) -> str:
    """Code in the one layout that Python gives it; a fragment as it is."""
    try:
        return ast.unparse(ast.parse(code.strip()))
    except SyntaxError:
        return code


def matches(text: str, piece: str, *, renaming: bool) -> Iterator[Match]:
    """Where the words of a piece stand in a text, one after another."""
    whole, wanted = words(text), words(piece)
    for i in range(len(whole) - len(wanted) + 1):
        there = whole[i : i + len(wanted)]
        if [w.kind for w in there] != [w.kind for w in wanted]:
            continue
        names = matched(there, wanted, words_in(function_at(text, there[0].start)) if renaming else None)
        if names is not None:
            yield Match(there[0].start, there[-1].end, names)


def matched(there: tuple[Word, ...], wanted: tuple[Word, ...], at_home: frozenset[str] | None) -> dict[str, str] | None:
    """The names of the quotation as the source has them, or None where the words differ.

    A name may have become another only if it is gone from its function, whose names are ``at_home``; None: it may not.
    """
    names: dict[str, str] = {}
    for now, then in zip(there, wanted, strict=True):
        if names.setdefault(then.text, now.text) != now.text:
            return None
        if now.text != then.text and (now.kind != "name" or at_home is None or then.text in at_home):
            return None
    return names if len(set(names.values())) == len(names) else None


@cache
def words(code: str) -> tuple[Word, ...]:
    """The words of a code, strings by their value, without the comma after a last element."""
    found: list[Word] = []
    for match in WORD.finditer(code):
        kind, text = str(match.lastgroup), match[0]
        if kind == "skip":
            continue
        if kind == "string" and text[0] in "'\"":
            text = repr(ast.literal_eval(text))
        if kind == "name" and keyword.iskeyword(text):
            kind = "keyword"
        if text in (")", "]", "}") and found and found[-1].text == ",":
            found.pop()
        found.append(Word(kind, text, match.start(), match.end()))
    return tuple(found)


@cache
def words_in(code: str) -> frozenset[str]:
    return frozenset(word.text for word in words(code))


def function_at(text: str, place: int) -> str:
    """The innermost function around a place, or the whole text."""
    line = text.count("\n", 0, place) + 1
    around = [
        node
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    return text if innermost is None else ast.get_source_segment(text, innermost) or text


@cache
def of_module(text: str) -> frozenset[str]:
    """The names that every function of a module knows."""
    lines = (words(ast.unparse(node).partition("\n")[0]) for node in parsed(text).body)
    return frozenset(word.text for line in lines for word in line if word.kind == "name")


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def renamed(after: str, names: dict[str, str], function: str, text: str) -> str:
    """What to write there, in the source's own names; a name that nobody there knows is an error and no mistake."""
    if all(then == now for then, now in names.items()):
        return after
    parts, end = [], 0
    known = words_in(function) | of_module(text) | set(names) | set(vars(builtins)) | bound(after)
    for word in words(after):
        is_variable = word.kind == "name" and after[: word.start][-1:] != "."
        if is_variable and word.text not in known:
            raise ValueError(f"{word.text!r} in {after!r} is no name of the specification any more: quote it anew")
        parts.append(
            after[end : word.start] + (names.get(word.text, word.text) if is_variable else after[word.start : word.end])
        )
        end = word.end
    return "".join(parts) + after[end:]


def bound(code: str) -> set[str]:
    """The names that a piece of code makes itself, or uses as keywords."""
    found = words(code)
    return {a.text for a, b in pairwise(found) if a.kind == "name" and b.text in (":=", "=", ":", "in", ",")}
