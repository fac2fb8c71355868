"""Transformers' rules from names in files to names in memory, as ``map.json`` holds them.

The file is written from an installed transformers by tests/support/merge/names/write_map.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from merit_fast.records import record

LEGACY = "legacy"  # rules of every model
_LONGEST = 256  # characters of a name that rules search: a hostile one may cost no more


@record
class Rule:
    """A change of names. With ``operations`` it also joins, cuts or turns tensors.

    ``scope``: the path of the submodel whose names it changes, without the root's prefix; None: all
    names.
    """

    kind: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    offset: int = 0  # added to the number that a match captures
    operations: tuple[Mapping[str, Any], ...] = ()
    scope: str | None = None
    prefix: str = ""  # of the root model, with a scope

    @property
    def is_group(self) -> bool:
        """Whether the pairs of sources and targets hold only once the first has been met."""
        return self.kind == "GroupWeightRename"


@dataclass
class Renamer:
    """Applies a model's rules to its names, which must come in ``natural_order``."""

    rules: tuple[Rule, ...]
    _met: set[int] = field(default_factory=set)

    def renamed(self, name: str) -> str:
        """The name after all rules without operations, in turn."""
        for number, rule in enumerate(self.rules):
            if not rule.operations:
                name = self._apply(number, rule, name)[0]
        return name

    def converted(self, name: str) -> tuple[str, Rule | None, int]:
        """(name of the first tensor it becomes part of, the rule, number of the rule's source)."""
        for number, rule in enumerate(self.rules):
            if rule.operations:
                new, source = self._apply(number, rule, name)
                if source >= 0:
                    return new, rule, source
        return name, None, -1

    def _apply(self, number: int, rule: Rule, name: str) -> tuple[str, int]:
        """The new name and the number of the source that matches; -1: none does."""
        head, tail = _scoped(rule, name) if len(name) <= _LONGEST else (name, "")
        match = _pattern(rule.sources).search(tail) if tail else None
        if match is None:
            return name, -1
        group = next(key for key, text in match.groupdict().items() if text is not None)
        source = int(group[1:])
        if rule.is_group:
            if source == 0:
                self._met.add(number)
            if number not in self._met:
                return name, -1
        target = rule.targets[source if rule.is_group else 0]
        first = match.re.groupindex[group]
        new = re.sub(r"\\(\d+)", lambda found: _captured(match, first, found, rule), target)
        return head + tail.replace(match.group(0), new, 1), source


def natural_order(name: str) -> list[tuple[int, int, str, int]]:
    """Sort key of a name: numbers between dots, and at the ends of words, by value."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        is_number = not text and part.isascii()
        parts.append(
            (0, int(part), "", -1)
            if part and is_number
            else (1, 0, text, int(digits) if digits.isascii() and digits else -1)
        )
    return parts


def numberless(name: str) -> str:
    """The name with # for every number between dots."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def rules_of(key: str) -> tuple[Rule, ...] | None:
    """The rules of a class name or model_type; None where transformers has none."""
    listed = conversion_map()["rules"].get(key)
    while isinstance(listed, str):
        listed = conversion_map()["rules"][listed]
    if listed is None:
        return None
    return tuple(
        Rule(
            rule["kind"],
            tuple(rule["sources"]),
            tuple(rule["targets"]),
            rule.get("offset", 0),
            tuple(rule.get("operations", ())),
        )
        for rule in listed
    )


@cache
def conversion_map() -> dict[str, Any]:
    """The content of map.json: rules, text_models, classes and the version of transformers."""
    content: dict[str, Any] = json.loads(files(__package__).joinpath("map.json").read_text())
    return content


@cache
def _pattern(sources: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for all sources, the longest first; a source ends where a word ends."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        text = source.replace("*.", r".*\.")
        if re.search(r"[a-zA-Z0-9]$", text):
            text += r"(?!\w)"
        branches.append(f"(?P<g{number}>{text})")
    return re.compile("|".join(branches))


def _scoped(rule: Rule, name: str) -> tuple[str, str]:
    """(prefix that stays, rest in which the rule searches); the rest is "" outside its scope."""
    if rule.scope is None:
        return "", name
    scope = f"{rule.scope}." if rule.scope else ""
    prefix = f"{rule.prefix}." if rule.prefix else ""
    for head in (prefix + scope, scope):
        if name.startswith(head):
            return head, name.removeprefix(head)
    return name, ""


def _captured(match: re.Match[str], first: int, found: re.Match[str], rule: Rule) -> str:
    text: str = match.group(first + int(found.group(1))) or ""
    return str(int(text) + rule.offset) if rule.offset else text
