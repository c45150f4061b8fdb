"""Generates the commands' pages and the man page from the help texts: `make docs`.

A command's help is its module's docstring: a sentence, then sections whose headings end in a colon.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
REFERENCE = HERE / "reference.md"
PACKAGE = HERE.parent / "calicoctl"


def main(target: Path) -> None:
    """Write the man page, and one page per command, into a directory."""
    usage = _constant(PACKAGE / "cli/main.py", "USAGE")
    helps = {
        path.stem: str(ast.get_docstring(ast.parse(path.read_text())))
        for path in sorted((PACKAGE / "commands").glob("*.py"))
        if path.stem != "__init__"
    }
    (target / "commands").mkdir(parents=True, exist_ok=True)
    for name, text in helps.items():
        (target / "commands" / f"{name}.md").write_text(page(name, text))
    (target / "calicoctl.1").write_text(man(usage, helps, REFERENCE.read_text()))


def _constant(path: Path, name: str) -> str:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value))
    raise LookupError(name)


def sections(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the first sentence of a help text, and its sections as (heading, text); plain text has the heading ""."""
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


def man(usage: str, helps: dict[str, str], reference: str) -> str:
    """Return the man page, in roff. EXIT STATUS, ENVIRONMENT and FILES are generated from tables of reference.md."""
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
    variables = [
        (name, f"{meaning}; default: {default}" if default else meaning)
        for name, meaning, default in table(reference, "Environment and settings")
    ]
    for heading, entries in (
        ("EXIT STATUS", table(reference, "Output and exit statuses")),
        ("ENVIRONMENT", variables),
        ("FILES", table(reference, "Files")),
    ):
        lines.append(f".SH {heading}")
        for name, meaning in entries:
            lines += [".TP", f"\\fB{_escaped(name)}\\fR", _escaped(meaning)]
    return "\n".join(lines) + "\n"


def table(text: str, heading: str) -> list[tuple[str, ...]]:
    """Return the rows of the table below a heading of a Markdown text, without backquotes, and links as their texts."""
    rows = re.findall(r"^\|(.*)\|$", text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0], re.MULTILINE)
    return [
        tuple(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell).strip().replace("`", "") for cell in row.split("|"))
        for row in rows[2:]
    ]


def _verbatim(text: str) -> list[str]:
    # without the page's own indent, lines of 78 columns fit a terminal of 80
    return [".PP", ".in 0", ".nf", *(_escaped(line) for line in text.splitlines()), ".fi", ".in"]


def _escaped(line: str) -> str:
    line = line.replace("\\", "\\\\").replace("-", "\\-")
    return f"\\&{line}" if line[:1] in (".", "'") else line


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE)
