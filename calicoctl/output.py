"""What commands print: ASCII grids for people, JSON for scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from calicoctl.errors import one_line, printable

T = TypeVar("T")


def wants_json(arguments: dict[str, Any]) -> bool:
    """Tell whether --output=json was given."""
    return bool(arguments["--output"] == "json")


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], widest: int | None = None) -> None:
    """Print a grid with a heading; cells are aligned to the left, and broken where they are wider than `widest`."""
    from prettytable import PrettyTable

    table = PrettyTable(list(columns))
    table.align = "l"
    table.max_width = widest
    table.add_rows([["" if cell is None else printable(str(cell)) for cell in row] for row in rows])
    print(table)


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield items; where standard error is a terminal, tell there how many are done, in one line."""
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    with tqdm(total=len(items), desc=what, leave=False, file=sys.stderr) as bar:
        for item in items:
            bar.clear()  # what is printed meanwhile must not stand behind it
            yield item
            sys.stdout.flush()
            bar.update()
            bar.refresh()


def warn(sentence: str) -> None:
    """Print something that the user should know, and that is not the result, to standard error."""
    print(one_line(sentence), file=sys.stderr)
