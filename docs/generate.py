"""Writes the pages of the commands and the man page, from what `--help` shows: `make docs`.

A command's help is its module's docstring: a sentence, then sections whose headings end in a colon.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "calicoctl"


def main(target: Path) -> None:
    """Write the man page and a page a command into a folder."""
    usage = _constant(PACKAGE / "cli.py", "USAGE")
    helps = {
        path.stem: str(ast.get_docstring(ast.parse(path.read_text())))
        for path in sorted((PACKAGE / "commands").glob("*.py"))
        if path.stem != "__init__"
    }
    (target / "commands").mkdir(parents=True, exist_ok=True)
    for name, text in helps.items():
        (target / "commands" / f"{name}.md").write_text(page(name, text))
    (target / "calicoctl.1").write_text(man(usage, helps))


def _constant(path: Path, name: str) -> str:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value))
    raise LookupError(name)


def sections(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a help's first sentence, and its parts with their headings, "" for plain text."""
    first, _, rest = text.strip().partition("\n\n")
    parts: list[tuple[str, str]] = []
    for block in rest.split("\n\n"):
        heading, _, body = block.partition("\n")
        if heading.endswith(":") and not heading.startswith(" "):
            parts.append((heading[:-1], body))
        elif block.startswith(" ") and parts:
            parts[-1] = (parts[-1][0], f"{parts[-1][1]}\n\n{block}")
        else:
            parts.append(("", block))
    return first, parts


def page(name: str, text: str) -> str:
    """Return a command's page in Markdown."""
    first, parts = sections(text)
    lines = [f"# calicoctl {name}", "", first]
    for heading, body in parts:
        if not heading:
            plain, *blocks = body.split("\n\n")
            lines += ["", plain]
            for block in blocks:
                lines += ["", *(f"  {line}" for line in block.splitlines())]
            continue
        lines += ["", f"## {heading}", "", "```sh" if heading == "Examples" else "```"]
        lines += [line[2:] if line.startswith("  ") else line for line in body.splitlines()]
        lines.append("```")
    return "\n".join(lines) + "\n"


def man(usage: str, helps: dict[str, str]) -> str:
    """Return the man page, in roff."""
    first, _, rest = usage.strip().partition("\n\n")
    lines = [".TH CALICOCTL 1", ".SH NAME", f"calicoctl \\- {_escaped(first[0].lower() + first[1:].rstrip('.'))}"]
    lines += [".SH SYNOPSIS", *_verbatim(rest)]
    for name, text in helps.items():
        sentence, parts = sections(text)
        lines += [f".SH CALICOCTL {name.upper()}", _escaped(sentence)]
        for heading, body in parts:
            if heading:
                lines += [".PP", f"\\fB{heading}\\fR", *_verbatim(body)]
            else:
                plain, *blocks = body.split("\n\n")
                lines += [".PP", *map(_escaped, plain.splitlines())]
                for block in blocks:
                    lines += _verbatim(block)
    return "\n".join(lines) + "\n"


def _verbatim(text: str) -> list[str]:
    return [".PP", ".nf", *(_escaped(line) for line in text.splitlines()), ".fi"]


def _escaped(line: str) -> str:
    line = line.replace("\\", "\\\\").replace("-", "\\-")
    return f"\\&{line}" if line[:1] in (".", "'") else line


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE)
