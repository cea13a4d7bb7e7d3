"""JSON grammars whose answers have an end: numbers have so many digits, and what may hold itself does so to a depth.

Both are without end in JSON and in its schemas, and a small model goes on for ever where it may. Works on what
`Grammar.serialize_json` gives, in which a rule has a body, and a body is made of expressions: kind, then data.

A rule that may hold itself stands in the result once for each level, and refers to the next level where the answer
goes deeper. On the last level only those choices are left that lead to an end without going deeper.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

from actors.grammar.errors import BadGrammar
from actors.grammar.library import xgrammar

LEVELS = 16
"""How often an object or list may stand, by way of others, in one of its kind."""
MAX_COPIES, MIN_LEVELS = 8192, 4
"""Of rules, in one grammar: a schema of hundreds of objects that refer to each other has fewer levels, and multiples of
a large integer fewer digits."""
DIGITS, EXPONENT_DIGITS = 17, 3
"""Of a number, and of its fraction; a double has no more."""

_TEXT, _CLASS, _CLASS_STAR, _EMPTY, _RULE, _SEQUENCE, _CHOICES, _TAGS, _REPEAT = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Kinds of expressions. The data of a class is [negative, first, last …], of a rule its index, of a sequence and of
choices expressions, of tags [text, rule … two more], of a repetition [rule, least, most]. Other kinds have no rules."""
_DIGIT = [0, *b"09"]
_DIGIT_TEXTS = [(_TEXT, [digit]) for digit in b"0123456789"]
_EXPONENT = (_CLASS, [0, *b"eeEE"])
_BODY = 1
_PLAIN = (-1, False, -1, -1, "", False, None)
"""What a rule has behind its body: nothing about what follows it, no limits, no capture."""
_NEVER = 1 << 30

Expression = tuple[int, list[int]]
Reference = tuple[int, bool]
Remainder = tuple[tuple[int, int], ...]
References = dict[int, list[Reference]]
"""By rule, the others that it refers to, and whether they stand at its end."""


def bounded(grammar: Any) -> Any:
    """xgrammar's `Grammar` of JSON, so changed that every answer ends.

    Raises BadGrammar if none can.
    """
    document = json.loads(grammar.serialize_json())
    rules = _Rules(document)
    rules.bound_numbers()
    rules.share_multiples()
    rules.bound_depth(document["root_rule_id"])
    rules.write(document)
    return xgrammar().Grammar.deserialize_json(json.dumps(document))


class Group(NamedTuple):
    """Rules that refer to each other in circles.

    Attributes:
        heads: those of them on which a level begins: no circle, but for mere repetition, goes round them all.
    """

    rules: set[int]
    heads: set[int]


_NO_GROUP = Group(set(), set())


class _Rules:
    """The rules of one grammar. Expressions are never changed, only added."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.rules: list[list[Any]] = document["rules"]
        data, starts = document["grammar_expr_data"], document["grammar_expr_indptr"]
        self.expressions: list[Expression] = [
            (data[start], data[start + 2 : start + 2 + data[start + 1]]) for start in starts
        ]
        self._names = {rule[0] for rule in self.rules}

    def write(self, document: dict[str, Any]) -> None:
        data: list[int] = []
        starts: list[int] = []
        for kind, values in self.expressions:
            starts.append(len(data))
            data += [kind, len(values), *values]
        document.update(rules=self.rules, grammar_expr_data=data, grammar_expr_indptr=starts)

    # Numbers.

    def bound_numbers(self) -> None:
        """Digits without end stand in numbers only: strings of a pattern are expressions of their own kind."""
        digit_rules = {rule for rule in range(len(self.rules)) if self._is_digit(self._body(rule))}
        for rule in range(len(self.rules)):
            self.rules[rule][_BODY] = self._with_bounded_digits(self._body(rule), digit_rules, DIGITS)

    def _is_digit(self, index: int) -> bool:
        kind, values = self.expressions[index]
        if kind in (_SEQUENCE, _CHOICES) and len(values) == 1:
            return self._is_digit(values[0])
        return kind == _CLASS and values == _DIGIT

    def _with_bounded_digits(self, index: int, digit_rules: set[int], most: int) -> int:
        kind, values = self.expressions[index]
        if kind in (_SEQUENCE, _CHOICES):
            if kind == _SEQUENCE and self.expressions[values[0]] == _EXPONENT:
                most = EXPONENT_DIGITS
            parts = [self._with_bounded_digits(part, digit_rules, most) for part in values]
            return index if parts == values else self._add(kind, parts)
        if kind == _REPEAT and values[0] in digit_rules and values[2] < 0:
            return self._add(kind, [values[0], values[1], max(values[1], most)])
        if kind == _CLASS_STAR and values == _DIGIT:
            rule = self._digit_rule(digit_rules)
            return self._add(_REPEAT, [rule, 0, most - 1])  # the first one stands before it
        return index

    def _digit_rule(self, digit_rules: set[int]) -> int:
        if not digit_rules:
            body = self._add(_CHOICES, [self._add(_SEQUENCE, [self._add(_CLASS, _DIGIT)])])
            self.rules.append([self._named("digit"), body, *_PLAIN])
            digit_rules.add(len(self.rules) - 1)
        return min(digit_rules)

    def share_multiples(self) -> None:
        """Integers that must be multiples of the same one share the rules of their digits, of which there are many."""
        first: dict[tuple[Remainder, ...], list[int]] = {}
        others: dict[int, int] = {}
        for group in self._multiples():
            rules = sorted(group)
            place = {rule: index for index, rule in enumerate(rules)}
            rests = tuple(tuple((digit, place[rest]) for digit, rest in self._remainder(rule) or ()) for rule in rules)
            others.update(zip(rules, first.setdefault(rests, rules), strict=True))
        for rule in range(len(self.rules) if others else 0):
            self.rules[rule][_BODY] = self._renamed(self._body(rule), others)
        for rule, other in others.items():
            if rule != other:
                self.rules[rule][_BODY] = self._add(_CHOICES, [self._add(_EMPTY, [])])

    def _multiples(self) -> list[set[int]]:
        """Groups of rules of the rest of an integer's digits, of which it must be a multiple: one a remainder."""
        found = {rule: self._remainder(rule) for rule in range(len(self.rules))}
        rests = {rule: [rest for _, rest in remainder] for rule, remainder in found.items() if remainder}
        graph = {rule: [rest for rest in each if rest in rests] for rule, each in rests.items()}
        return [group for group in _strong_components(graph) if all(group.issuperset(rests[rule]) for rule in group)]

    def _remainder(self, rule: int) -> Remainder | None:
        """The digits that a rule begins with, and the rule that follows each; None if that is not what it is."""
        kind, choices = self.expressions[self._body(rule)]
        if kind != _CHOICES:
            return None
        found = []
        for part, values in (self.expressions[each] for each in choices):
            digit, rest = [self.expressions[each] for each in values] if len(values) == 2 else [(_EMPTY, [])] * 2
            if part == _SEQUENCE and digit in _DIGIT_TEXTS and rest[0] == _RULE:
                found.append((digit[1][0], rest[1][0]))
            elif part != _EMPTY:
                return None
        return tuple(found)

    # Depth.

    def bound_depth(self, root: int) -> None:
        references = {rule: self._references(self._body(rule)) for rule in range(len(self.rules))}
        nesting = [Group(rules, _heads(rules, references)) for rules in _nesting(references)]
        multiples = [Group(rules, rules) for rules in self._multiples()]
        if not nesting and not multiples:
            return
        heights = self._heights(nesting + multiples)
        if any(heights[rule] >= _NEVER for rule in (root, *self._tagged())):
            raise BadGrammar("The JSON schema allows no answer that ends: what it describes holds itself, always.")
        for rule, height in enumerate(heights):
            if height < _NEVER:
                self.rules[rule][_BODY] = self._ending(self._body(rule), heights, _NO_GROUP, _NEVER - 1)
        for found, most in ((multiples, DIGITS - 1), (nesting, LEVELS)):
            levels = max(MIN_LEVELS, min(most, MAX_COPIES // max(1, sum(len(group.rules) for group in found))))
            for group in found:
                self._unfold(group, heights, levels)

    def _tagged(self) -> list[int]:
        """The rules of what follows tags: they cannot be left out, for whoever writes a tag does not know them."""
        return [rule for kind, values in self.expressions if kind == _TAGS for rule in values[1:-2:2]]

    def _references(self, index: int, last: bool = True) -> list[Reference]:
        """The rules an expression refers to, and whether each stands at its end."""
        kind, values = self.expressions[index]
        if kind == _RULE:
            return [(values[0], last)]
        if kind == _REPEAT:
            return [(values[0], False)]
        if kind == _TAGS:
            return [(rule, False) for rule in values[1:-2:2]]
        found = []
        if kind in (_SEQUENCE, _CHOICES):
            for place, part in enumerate(values):
                found += self._references(part, last and (kind == _CHOICES or place == len(values) - 1))
        return found

    def _heights(self, groups: list[Group]) -> list[int]:
        """Of each rule, through how many heads of its group it has to go to an end; `_NEVER` if there is none."""
        group_of = {rule: group for group in groups for rule in group.rules}
        heights = [_NEVER] * len(self.rules)
        changed = True
        while changed:
            changed = False
            for rule in range(len(self.rules)):
                height = self._height(self._body(rule), heights, group_of.get(rule, _NO_GROUP))
                if height < heights[rule]:
                    heights[rule], changed = height, True
        return heights

    def _height(self, index: int, heights: list[int], group: Group) -> int:
        kind, values = self.expressions[index]
        if kind == _CHOICES:
            return min(self._height(each, heights, group) for each in values)
        if kind == _SEQUENCE:
            return max((self._height(each, heights, group) for each in values), default=0)
        if kind == _RULE or (kind == _REPEAT and values[1] > 0):
            return _height_through(values[0], heights, group)
        return 0

    def _ending(self, index: int, heights: list[int], group: Group, most: int) -> int:
        """An expression without what is higher than that and need not stand there."""
        kind, values = self.expressions[index]
        if kind == _CHOICES:
            values = [each for each in values if self._height(each, heights, group) <= most]
        if kind in (_CHOICES, _SEQUENCE):
            return self._changed(index, kind, [self._ending(each, heights, group, most) for each in values])
        if kind == _REPEAT and values[1] == 0 and _height_through(values[0], heights, group) > most:
            return self._add(_EMPTY, [])
        return index

    def _unfold(self, group: Group, heights: list[int], levels: int) -> None:
        """Puts the rules of a group there once for each level, and once more for the last."""
        rules = [rule for rule in group.rules if heights[rule] < _NEVER]
        copies = [{rule: rule for rule in rules}]
        for level in range(1, levels + 1):
            copies.append({rule: len(self.rules) + place for place, rule in enumerate(rules)})
            self.rules += [
                [self._named(f"{self.rules[rule][0]}_level_{level}"), *self.rules[rule][1:]] for rule in rules
            ]
        for rule in rules:
            body = self._body(rule)
            for level, here in enumerate(copies[:-1]):
                below = {**here, **{head: copies[level + 1][head] for head in group.heads.intersection(rules)}}
                self.rules[here[rule]][_BODY] = self._renamed(body, below)
            last = self._ending(body, heights, group, heights[rule])
            self.rules[copies[-1][rule]][_BODY] = self._renamed(last, copies[-1])

    def _renamed(self, index: int, names: dict[int, int]) -> int:
        kind, values = self.expressions[index]
        if kind in (_SEQUENCE, _CHOICES):
            return self._changed(index, kind, [self._renamed(each, names) for each in values])
        if kind in (_RULE, _REPEAT):
            return self._changed(index, kind, [names.get(values[0], values[0]), *values[1:]])
        return index

    def _named(self, name: str) -> str:
        """A name that no rule has yet; a schema's definitions may be called anything."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    # Expressions.

    def _body(self, rule: int) -> int:
        return int(self.rules[rule][_BODY])

    def _add(self, kind: int, values: list[int]) -> int:
        self.expressions.append((kind, values))
        return len(self.expressions) - 1

    def _changed(self, index: int, kind: int, values: list[int]) -> int:
        return index if values == self.expressions[index][1] else self._add(kind, values)


def _height_through(rule: int, heights: list[int], group: Group) -> int:
    if heights[rule] >= _NEVER:
        return _NEVER
    return heights[rule] + (rule in group.heads) if rule in group.rules else 0


def _nesting(references: References) -> list[set[int]]:
    """Groups of rules that hold each other. A rule that holds itself at its end only repeats, as that of a string's
    characters does, and does not nest."""
    return [
        group
        for group in _strong_components({rule: [other for other, _ in each] for rule, each in references.items()})
        if any(other in group and not last for rule in group for other, last in references[rule])
    ]


def _heads(group: set[int], references: References) -> set[int]:
    """Rules of a group without which it would not nest: few, for each is a level. Greedily, the most referred to."""
    heads: set[int] = set()
    groups = [group]
    while groups:
        group = groups.pop()
        counts = Counter(other for rule in group for other, _ in references[rule] if other in group)
        head = max(sorted(group), key=lambda rule: counts[rule])
        heads.add(head)
        rest = group - {head}
        groups += _nesting({rule: [each for each in references[rule] if each[0] in rest] for rule in rest})
    return heads


def _strong_components(graph: dict[int, list[int]]) -> list[set[int]]:
    """Sets of nodes that lead to each other: Kosaraju's algorithm."""
    back: dict[int, list[int]] = {node: [] for node in graph}
    for node, others in graph.items():
        for other in others:
            back[other].append(node)
    found: list[set[int]] = []
    seen: set[int] = set()
    for start in reversed(_finished(graph)):
        if start in seen:
            continue
        seen.add(start)
        component, waiting = {start}, [start]
        while waiting:
            new = set(back[waiting.pop()]) - seen
            seen |= new
            component |= new
            waiting += new
        found.append(component)
    return found


def _finished(graph: dict[int, list[int]]) -> list[int]:
    """The nodes in the order in which a walk, depth first, is done with them."""
    done: list[int] = []
    seen: set[int] = set()
    for start in graph:
        way = [] if start in seen else [(start, iter(graph[start]))]
        seen.add(start)
        while way:
            node, others = way[-1]
            for other in others:
                if other not in seen:
                    seen.add(other)
                    way.append((other, iter(graph[other])))
                    break
            else:
                done.append(node)
                way.pop()
    return done
