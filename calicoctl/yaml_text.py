"""Writes YAML that every reader understands in the same way."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

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
    return text.removesuffix("...\n")  # the end of a document that is a single plain word


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
