"""A small GraphQL reader: enough of the language for what the W&B client asks.

A schema is plain Python. An object is a mapping from field name to value; a value may be a
function, which is called with the field's arguments (those that it names, in snake_case; a
mutation's single argument `input` is unpacked). A field without a selection is returned as it
is, so JSON scalars need no care.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(
    r'(?P<skip>[\s,\ufeff]+|#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<punctuation>\.\.\.|[!$():=@\[\]{}|])'
    r"|(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
)
INTERFACES = {"ArtifactSequence": "ArtifactCollection"}
"""Concrete type → the interface under which the client asks for it."""


class GraphQLError(Exception):
    """The answer is an error message; `status` is the HTTP status that comes with it."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class UnknownFieldError(GraphQLError):
    """The schema lacks a field that was asked for."""

    def __init__(self, name: str, owner: str) -> None:
        super().__init__(f'Cannot query field "{name}" on type "{owner}".', status=400)


@dataclass(frozen=True)
class Variable:
    """A `$name` in a document."""

    name: str


@dataclass
class Field:
    """One field of a selection; `selection` is None for a scalar."""

    name: str
    alias: str
    arguments: dict[str, Any]
    directives: dict[str, dict[str, Any]]
    selection: list[Any] | None


@dataclass
class Spread:
    """`...Name` or `... on Type {…}`."""

    fragment: str | None
    on_type: str | None
    directives: dict[str, dict[str, Any]]
    selection: list[Any]


@dataclass
class Document:
    """One operation and its fragments."""

    kind: str = "query"
    name: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    selection: list[Any] = field(default_factory=list)
    fragments: dict[str, Spread] = field(default_factory=dict)


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = list(self._split(text))
        self.at = 0

    @staticmethod
    def _split(text: str) -> Iterator[str]:
        at = 0
        while at < len(text):
            found = TOKEN.match(text, at)
            if not found:
                raise GraphQLError(f"Syntax Error: unexpected {text[at]!r}", status=400)
            if found.lastgroup != "skip":
                yield found.group()
            at = found.end()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise GraphQLError(f"Syntax Error: expected {expected}, found {token!r}", status=400)
        self.at += 1
        return token

    def skip(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def document(self) -> Document:
        document = Document()
        while self.peek():
            if self.skip("fragment"):
                name = self.take()
                self.take("on")
                on_type = self.take()
                document.fragments[name] = Spread(name, on_type, {}, self.selection())
                continue
            if self.peek() in ("query", "mutation"):
                document.kind = self.take()
                if self.peek() not in "({@":
                    document.name = self.take()
                if self.skip("("):
                    document.defaults = self.variables()
            document.selection = self.selection()
        return document

    def variables(self) -> dict[str, Any]:
        """Variable definitions up to `)`; returns the defaults."""
        defaults = {}
        while not self.skip(")"):
            self.take("$")
            name = self.take()
            self.take(":")
            while self.peek() not in ("$", ")", "="):
                self.take()  # its type
            if self.skip("="):
                defaults[name] = self.value()
        return defaults

    def selection(self) -> list[Any]:
        self.take("{")
        found = []
        while not self.skip("}"):
            found.append(self.spread() if self.skip("...") else self.field())
        return found

    def spread(self) -> Spread:
        name = on_type = None
        if self.skip("on"):
            on_type = self.take()
        elif self.peek() not in "@{":
            name = self.take()
        directives = self.directives()
        return Spread(name, on_type, directives, [] if name else self.selection())

    def field(self) -> Field:
        alias = name = self.take()
        if self.skip(":"):
            name = self.take()
        arguments = self.arguments()
        directives = self.directives()
        selection = self.selection() if self.peek() == "{" else None
        return Field(name, alias, arguments, directives, selection)

    def arguments(self) -> dict[str, Any]:
        found = {}
        if self.skip("("):
            while not self.skip(")"):
                name = self.take()
                self.take(":")
                found[name] = self.value()
        return found

    def directives(self) -> dict[str, dict[str, Any]]:
        found = {}
        while self.skip("@"):
            name = self.take()
            found[name] = self.arguments()
        return found

    def value(self) -> Any:
        token = self.take()
        if token == "$":
            return Variable(self.take())
        if token == "[":
            items = []
            while not self.skip("]"):
                items.append(self.value())
            return items
        if token == "{":
            entries = {}
            while not self.skip("}"):
                name = self.take()
                self.take(":")
                entries[name] = self.value()
            return entries
        if re.match(r'["\d-]', token) or token in ("true", "false", "null"):
            return json.loads(token)
        return token  # an enum's member


def parse(text: str) -> Document:
    """Read a document with one operation.

    Raises:
        GraphQLError: syntax error.
    """
    return _Parser(text).document()


def snake_case(name: str) -> str:
    """The Python form of a GraphQL name: `entityName` → `entity_name`, `artifactID` → `artifact_id`."""
    return re.sub(r"(?<=[a-z0-9])([A-Z]+)", r"_\1", name).lower()


class _Execution:
    def __init__(self, document: Document, variables: Mapping[str, Any]) -> None:
        self.fragments = document.fragments
        self.variables = {**document.defaults, **variables}

    def fill(self, value: Any) -> Any:
        """Put the variables in; entries of an object whose variable was not given are left out."""
        if isinstance(value, Variable):
            return self.variables.get(value.name)
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        if isinstance(value, dict):
            return {k: self.fill(v) for k, v in value.items() if self.is_given(v)}
        return value

    def is_given(self, value: Any) -> bool:
        return not isinstance(value, Variable) or value.name in self.variables

    def is_included(self, node: Field | Spread) -> bool:
        conditions = {name: self.fill(args)["if"] for name, args in node.directives.items()}
        return conditions.get("include", True) and not conditions.get("skip", False)

    def complete(self, value: Any, selection: list[Any] | None) -> Any:
        if value is None or selection is None:
            return value
        if isinstance(value, list):
            return [self.complete(item, selection) for item in value]
        answer: dict[str, Any] = {}
        self.select(value, selection, answer)
        return answer

    def select(self, owner: Any, selection: list[Any], answer: dict[str, Any]) -> None:
        for node in selection:
            if not self.is_included(node):
                continue
            if isinstance(node, Spread):
                fragment = self.fragments[node.fragment] if node.fragment else node
                kind = owner.get("__typename", fragment.on_type)
                if fragment.on_type in (None, kind, INTERFACES.get(kind)):
                    self.select(owner, fragment.selection, answer)
                continue
            if node.name not in owner:
                raise UnknownFieldError(node.name, str(owner.get("__typename", "?")))
            value = owner[node.name]
            if callable(value):
                value = self.call(value, self.fill(node.arguments))
            value = self.complete(value, node.selection)
            if isinstance(value, dict) and isinstance(answer.get(node.alias), dict):
                value = {**answer[node.alias], **value}  # the same field in two fragments
            answer[node.alias] = value

    @staticmethod
    def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        if set(arguments) == {"input"}:
            arguments = arguments["input"]
        given = {snake_case(name): value for name, value in arguments.items()}
        known = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            given = {name: value for name, value in given.items() if name in known}
        return function(**given)


def execute(document: Document, variables: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Answer an operation from the object `root`; returns the answer's `data`.

    Raises:
        GraphQLError: unknown field, or what the schema's functions raise.
    """
    return _Execution(document, variables).complete(root, document.selection)
