"""What commands print: ASCII grids for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from calicoctl.errors import UsageError, printable


def wants_json(arguments: dict[str, Any]) -> bool:
    """Tell whether --output=json was given; raise UsageError for any other format."""
    wanted = arguments["--output"]
    if wanted not in (None, "json"):
        raise UsageError(f"--output={wanted}: the only format is json; without the option, a table is printed")
    return wanted is not None


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a grid with a heading; cells are aligned to the left."""
    from prettytable import PrettyTable

    table = PrettyTable(list(columns))
    table.align = "l"
    table.add_rows([["" if cell is None else printable(str(cell)) for cell in row] for row in rows])
    print(table)


def warn(sentence: str) -> None:
    """Print something that the user should know, and that is not the result, to standard error."""
    print(sentence, file=sys.stderr)
