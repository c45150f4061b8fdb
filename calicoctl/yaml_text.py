"""Writes YAML that every reader understands in the same way, and reads YAML with the line of each part.

What is read is bounded, in its size, its depth and what its aliases (`*name`) stand for. Nothing of it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Union

from calicoctl.errors import CalicoError
from calicoctl.spelling import did_you_mean, nearest

LONGEST = 8 * 1024 * 1024
"""Maximum length of YAML that is read, in characters."""

PART = 500
"""The number of items of a list or a mapping that `dumped` converts at once."""

PARTS = 1_000_000
"""Maximum number of parts of YAML that is read: of texts, lists and mappings. What an alias stands for is counted again
at each alias."""

DEPTH = 48
"""Maximum nesting of lists and mappings: a value in the store (limits.DEPTH), and what is around it in a file."""

_OTHERWISE = re.compile(r"[yYnN]|[-+]?0o[0-7]+|[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][-+]?[0-9]+)?|=|<<")
"""Texts that some readers of YAML take for a boolean or a number, and others for text. They are quoted.

Source: https://yaml.org/type/ (YAML 1.1) and section 10.3.2 of YAML 1.2.2.
"""

_SURROGATES = re.compile("[\ud800-\udfff]")


class Inline(list[Any]):
    """A list that is written in one line, as `[a, b]`."""


def dump(value: Any) -> str:
    """Return a value that JSON can express as YAML, in ASCII. The order of keys is kept.

    The text is read as the same value by any reader of YAML 1.1 or 1.2: what could be read as something else is quoted.
    """
    import yaml

    # a line of any width: a broken line would be harder to compare
    text: str = yaml.dump(value, Dumper=_dumper(), sort_keys=False, default_flow_style=False, width=2**31 - 1)
    return text[: -len("...\n")] if text.endswith("\n...\n") else text  # the end of a document that is a plain word


def dumped(value: Any) -> Iterator[str]:
    """Yield what `dump` returns, in parts: PyYAML takes many times as much memory for a value as the value itself."""
    if not _is_large(value):
        yield dump(value)
        return
    is_list = isinstance(value, list)
    waiting: list[tuple[str, Any]] = []
    """Items of the list or mapping that are not large, to be converted together; names are "" in a list."""
    for name, one in (("", one) for one in value) if is_list else value.items():
        key = "- " if is_list else dump({name: 0}).removesuffix(" 0\n") + "\n"
        by_itself = _is_large(one) and not key.startswith("? ")  # the value of such a key is indented otherwise
        if waiting and (by_itself or len(waiting) >= PART):
            yield _together(waiting, is_list)
            waiting = []
        if not by_itself:
            waiting.append((name, one))
        elif is_list:
            first, *others = map(_indented, dumped(one))
            yield key + first[2:]
            yield from others
        else:
            yield key
            yield from dumped(one) if isinstance(one, list) else map(_indented, dumped(one))
    if waiting:
        yield _together(waiting, is_list)


def _together(items: list[tuple[str, Any]], is_list: bool) -> str:
    return dump([one for _, one in items] if is_list else dict(items))


def _is_large(value: Any) -> bool:
    """Return whether a list or a mapping with more than PART items is in a value."""
    if isinstance(value, Inline) or not isinstance(value, (list, dict)):
        return False
    return len(value) > PART or any(map(_is_large, value if isinstance(value, list) else value.values()))


def _indented(text: str) -> str:
    return re.sub("^(?=.)", "  ", text, flags=re.MULTILINE)


@cache
def _dumper() -> Any:
    """Return the class that PyYAML writes with. PyYAML is imported here, since few commands need it."""
    import yaml

    base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

    class Dumper(base):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True  # an equal part is written again, and not referred to

    def text(dumper: Any, data: str) -> Any:
        data = _SURROGATES.sub(lambda found: ascii(found[0])[1:-1], data)  # they cannot be encoded
        style = "'" if _OTHERWISE.fullmatch(data) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style)

    def inline(dumper: Any, data: Inline) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    Dumper.add_representer(str, text)
    Dumper.add_representer(Inline, inline)
    return Dumper


@dataclass(frozen=True)
class Node:
    """A part of YAML: a text, a list of parts, or a mapping of texts to parts.

    `line` is its line, counted from 1; for the value of a mapping, the line of its key. Every scalar is a text, as it
    stands in the file: `no`, `1:20` and `010` have no other meaning here. `plain` says that a text has no quotes.
    `source` is the name of the file.
    """

    source: str
    line: int
    value: Union[str, list[Node], dict[str, Node]]
    plain: bool = False

    def error(self, why: str) -> CalicoError:
        """Return an error that names the file and the line."""
        return CalicoError(f"{self.source}:{self.line}: {why}")

    def mapping(self, what: str, known: Iterable[str] | None = None) -> dict[str, Node]:
        """Return the value if it is a mapping. Raise CalicoError if not, or if it has a key that is not `known`.

        `what` is what the error calls this part, such as "a profile".
        """
        if not isinstance(self.value, dict):
            raise self.error(f"{what} must be a mapping, NAME: VALUE ({{}} if it is empty)")
        allowed = None if known is None else list(known)
        for name, node in self.value.items():
            if allowed is not None and name not in allowed:
                near = nearest(name, allowed)
                raise node.error(
                    f"{what} has no '{name}': it can have {', '.join(allowed)}{did_you_mean(near and repr(near))}"
                )
        return self.value

    def items(self, what: str) -> list[Node]:
        """Return the value if it is a list, or raise CalicoError. `what`: see `mapping`."""
        if not isinstance(self.value, list):
            raise self.error(f"{what} must be a list ([] if it is empty)")
        return self.value

    def text(self, what: str) -> str:
        """Return the value if it is a text, and not left out, or raise CalicoError. `what`: see `mapping`."""
        if not isinstance(self.value, str):
            raise self.error(f"{what} must be a single value")
        if self.plain and self.value in ("", "~", "null"):
            raise self.error(f"{what} has no value")
        return self.value

    def data(self) -> Any:
        """Return the value as JSON has it: a plain text may be null, a boolean or a number.

        Raises CalicoError for a plain text that readers of YAML understand differently, such as `no` or `010`.
        """
        if isinstance(self.value, dict):
            return {name: node.data() for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.data() for node in self.value]
        if not self.plain:
            return self.value
        if self.value in _CONSTANTS:
            return _CONSTANTS[self.value]
        if _INTEGER.fullmatch(self.value):
            return int(self.value)
        if _FLOAT.fullmatch(self.value):
            return float(self.value)
        if _is_ambiguous(self.value):
            raise self.error(f"{self.value} can be understood in several ways: put it in quotes")
        return self.value


def _is_ambiguous(text: str) -> bool:
    """Return whether some readers of YAML take a plain text for something else than a text."""
    import yaml

    patterns = yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], [])
    return bool(_OTHERWISE.fullmatch(text)) or any(pattern.match(text) for _, pattern in patterns)


_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
_CONSTANTS.update({".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")})
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,4000})", re.ASCII)
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?", re.ASCII)


@dataclass
class _Open:
    """A list or mapping whose end has not been read yet. `before` is the number of parts that were read before it."""

    node: Node
    anchor: str | None
    before: int
    key: Node | None = field(default=None)


def load(text: str, source: str) -> Node:
    """Parse a document of YAML. `source` is its name in errors.

    Raises CalicoError for invalid or too large YAML, several documents, tags (`!name`), merge keys (`<<`), a key that
    is there twice in a mapping, and a key that is no text.
    """
    if len(text) > LONGEST:
        raise CalicoError(f"{source}: it has more than {LONGEST // 1024 // 1024} MiB")
    import yaml

    try:
        return _compose(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), source)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, text.find(chr(error.character))) + 1 if isinstance(error.character, int) else 1
        raise CalicoError(f"{source}:{line}: it is no YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        raise CalicoError(f"{place}: it is no YAML: {error.problem or error.context}") from None


def _compose(events: Iterable[Any], source: str) -> Node:
    """Return the document that PyYAML's `events` describe. Not recursive, unlike PyYAML's own function for this."""
    import yaml

    stack: list[_Open] = []
    anchors: dict[str, tuple[Node, int]] = {}
    found: Node | None = None
    parts = 0
    for event in events:
        line = event.start_mark.line + 1
        here = Node(source, line, "")
        if isinstance(event, yaml.DocumentStartEvent) and found is not None:
            raise here.error("there is a second document, and a file can have one")
        if not isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = stack.pop()
            node = ended.node
            if ended.anchor is not None:
                anchors[ended.anchor] = (node, parts - ended.before)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise here.error(f"nothing before this line is called &{event.anchor}")
            same, size = anchors[event.anchor]
            node = replace(same, line=line)
            parts += size
        else:
            parts += 1
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise here.error(f"'{tag}' is a tag, which cannot be used here")
            if isinstance(event, yaml.ScalarEvent):
                node = Node(source, line, event.value, plain=event.implicit[0])
                if event.anchor is not None:
                    anchors[event.anchor] = (node, 1)
            else:
                empty: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
                node = Node(source, line, empty)
                stack.append(_Open(node, event.anchor, parts - 1))
                if len(stack) > DEPTH:
                    raise here.error(f"it is nested deeper than {DEPTH} levels")
        if parts > PARTS:
            raise here.error(f"it has more than {PARTS} parts")
        if isinstance(event, yaml.CollectionStartEvent):
            continue
        if stack:
            _put(stack[-1], node)
        else:
            found = node
    if found is None:
        raise CalicoError(f"{source}:1: it is empty")
    return found


def _put(into: _Open, node: Node) -> None:
    """Add a complete part to the list or mapping that it belongs to."""
    if isinstance(into.node.value, list):
        into.node.value.append(node)
    elif into.key is not None:
        assert isinstance(into.node.value, dict) and isinstance(into.key.value, str)
        into.node.value[into.key.value] = replace(node, line=into.key.line)
        into.key = None
    else:
        assert isinstance(into.node.value, dict)
        if not isinstance(node.value, str):
            raise node.error("a list or a mapping cannot be a key")
        if node.plain and node.value == "<<":
            raise node.error("merge keys (<<) cannot be used here")
        if node.value in into.node.value:
            before = into.node.value[node.value].line
            raise node.error(f"'{node.value}' is there already, in line {before}")
        into.key = node
