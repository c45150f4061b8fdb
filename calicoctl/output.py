"""Prints results: ASCII tables, or JSON or YAML for scripts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from calicoctl.errors import one_line, printable
from calicoctl.limits import LINE, REPORTED, shortened

if TYPE_CHECKING:
    from prettytable import PrettyTable

T = TypeVar("T")

PART = 20_000
"""The number of cells of a table that are formatted at a time."""

_SHORT = 10
"""Words of up to this many characters, such as an ISO date, are not broken at hyphens if possible."""


def data_format(arguments: dict[str, Any]) -> str | None:
    """Return the format of data that the command line asks for, "json" or "yaml", None if it asks for text."""
    return None if arguments["--output"] in (None, "text") else str(arguments["--output"])


def print_data(value: Any, form: str) -> None:
    """Print a value that JSON can express, in the format `form`, "json" or "yaml".

    An iterator is printed as an array, item by item, so that not all are in memory at once. So is an iterator that is a
    value of a dictionary, if `value` is one; the values of a dictionary are printed one after the other.
    """
    by_name = isinstance(value, dict) and any(isinstance(one, Iterator) for one in value.values())
    if form == "yaml":
        _print_yaml_object(value) if by_name else _print_yaml(value)
    else:
        _print_json_object(value) if by_name else _print_json(value)
        print()


def _print_yaml_object(value: dict[str, Any]) -> None:
    from calicoctl.yaml_text import dump

    for name, one in value.items():
        if isinstance(one, Iterator):
            print(dump({name: []}).removesuffix(" []\n"), end="")
            _print_yaml(one, "\n", " ")
        else:
            _print_yaml({name: one})


def _print_yaml(value: Any, before: str = "", before_none: str = "") -> None:
    """Print a value. If it is an iterator, `before` stands before its first item, `before_none` if there is none."""
    from calicoctl.yaml_text import dumped

    if not isinstance(value, Iterator):
        for text in dumped(value):
            print(text, end="")
        return
    empty = True
    for item in value:
        print(before if empty else "", end="")
        _print_yaml([item])
        empty = False
    if empty:
        print(f"{before_none}[]")


def _print_json_object(value: dict[str, Any]) -> None:
    import json

    before = "{"
    for name, one in value.items():
        print(f"{before}\n  {json.dumps(name)}: ", end="")
        _print_json(one, "\n  ")
        before = ","
    print("\n}", end="")


def _print_json(value: Any, margin: str = "\n") -> None:
    """Print a value, without a newline at its end. `margin` is a newline, and how far the value is indented."""
    import json

    if not isinstance(value, Iterator):
        print(json.dumps(value, indent=2).replace("\n", margin), end="")
        return
    before = "["
    for item in value:
        print(f"{before}{margin}  " + json.dumps(item, indent=2).replace("\n", margin + "  "), end="")
        before = ","
    print("[]" if before == "[" else f"{margin}]", end="")


def abridges(arguments: dict[str, Any]) -> bool:
    """Return whether the command shortens ids, and fits tables to the width of the terminal.

    This is so if standard output is a terminal, and the command line does not contain --no-trunc.
    """
    return sys.stdout.isatty() and not arguments["--no-trunc"]


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    widest: int | None = None,
    expendable: Sequence[str] = (),
    complete: bool = False,
) -> None:
    """Print a table with a heading row, aligned to the left. None in `rows` is printed as an empty cell.

    A line of a cell that has more than limits.LINE characters is shortened.

    If standard output is a terminal and `complete` is False, the table is fitted to the terminal's width: `fit` may
    leave out columns that are named in `expendable`, and a warning names the columns that were left out.

    If standard output is not a terminal, or if `complete` is True, the table has any width that it needs. Then only
    cells of more than `widest` characters are wrapped; none if `widest` is None.
    """
    import shutil

    lines = [["" if cell is None else _cell(str(cell)) for cell in row] for row in chain([columns], rows)]
    if sys.stdout.isatty() and not complete:
        lines, left_out = fit(lines, shutil.get_terminal_size().columns, expendable)
        if left_out:
            warn(f"Columns left out because the terminal is too narrow: {', '.join(left_out)}; --no-trunc shows all.")
        widest = None
    widths = _column_widths(lines, widest)
    part = max(1, PART // len(columns))
    for start in range(0, len(lines), part):  # the text of a large table is never in memory as a whole
        rows = lines[start : start + part]
        if start <= part:  # one for the part with the heading, and one for all others: it has a dictionary per column
            table = _table(rows, widest, has_heading=start == 0)
            table.min_width.update(zip(table.field_names, widths))
        else:
            table.add_rows(rows)
        text = str(table)
        table.clear_rows()
        if start > 0:
            text = text.partition("\n")[2]  # without its upper frame
        if start + part < len(lines):
            text = text.rpartition("\n")[0]  # without its lower frame
        print(text)


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LINE else "\n".join(shortened(line, LINE) for line in text.split("\n"))


def _table(lines: list[list[str]], widest: int | None, has_heading: bool = False) -> PrettyTable:
    """Return a table with these rows, of which the first one may be the heading. `widest`: see print_table."""
    from prettytable import PrettyTable

    table = PrettyTable([str(number) for number in range(len(lines[0]))], header=False)
    table.align = "l"
    table.max_width = widest
    table.add_row(lines[0], divider=has_heading)
    table.add_rows(lines[1:])
    return table


def _column_widths(lines: list[list[str]], widest: int | None) -> list[int]:
    """Return the widths of a table's columns, in characters of a terminal. `widest`: see print_table."""
    samples: list[list[str]] = []
    for column in zip(*lines):
        parts = {part for cell in column for part in cell.split("\n")}
        wide = [part for part in parts if not part.isascii()]  # its characters may take no cell of a terminal, or two
        samples.append([max((part for part in parts if part.isascii()), key=len, default=""), *wide])
    frame = str(_table([list(row) for row in zip_longest(*samples, fillvalue="")], widest)).partition("\n")[0]
    return [len(part) - 2 for part in frame[1:-1].split("+")]


def fit(lines: list[list[str]], width: int, expendable: Sequence[str] = ()) -> tuple[list[list[str]], list[str]]:
    """Wrap the cells of a table so that the table is at most `width` characters wide.

    `lines` are the rows, the heading first. Cells are wrapped between words. If that is not enough, the columns named
    in `expendable` are left out, one after the other in this order, until the table fits. If it still does not fit,
    words are broken. Returns the rows, and the names of the columns that were left out.
    """
    left_out: list[str] = []
    while True:
        narrowest = [max(_least_width(cell) for cell in column) for column in zip(*lines)]
        room = width - 3 * len(narrowest) - 1  # beside the frame
        gone = next((name for name in expendable if name in lines[0]), None)
        if sum(narrowest) <= room or gone is None:
            break
        left_out.append(gone)
        place = lines[0].index(gone)
        lines = [line[:place] + line[place + 1 :] for line in lines]
    widths = [min(width, max(_longest(cell.splitlines()) for cell in column)) for column in zip(*lines)]
    # the widest columns shrink: first those that can still be wrapped between words
    while sum(widths) > max(room, len(widths)):
        least = narrowest if any(own > least for own, least in zip(widths, narrowest)) else [1] * len(widths)
        widths[max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))] -= 1
    return [["\n".join(_wrapped(cell, own)) for cell, own in zip(line, widths)] for line in lines], left_out


def _least_width(cell: str) -> int:
    """Return the smallest width to which a cell can be wrapped without breaking words, except at hyphens.

    Words of up to _SHORT characters are not broken at hyphens either.
    """
    words = cell.split()
    parts = [part + "-" for word in words for part in word.split("-")]
    return min(_longest(words), max(_SHORT, _longest(parts)))


def _longest(words: list[str]) -> int:
    return max(map(len, words), default=0)


def _wrapped(cell: str, width: int) -> list[str]:
    import textwrap

    lines = []
    for line in cell.splitlines():
        too_long = _longest(line.split()) > width
        lines += textwrap.wrap(line, width, break_on_hyphens=too_long) if len(line) > width else [line]
    return lines


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items; if standard error is a terminal, show a progress bar with the title `what` meanwhile."""
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    with tqdm(total=len(items), desc=what, leave=False, file=sys.stderr) as bar:
        for item in items:
            bar.clear()  # the caller may print, which must not be appended to the bar
            yield item
            sys.stdout.flush()
            bar.update()
            bar.refresh()


def quantity(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in "1 endpoint" and "2 endpoints". `noun` is the singular.

    `plural` is the plural; it may be left out if it is the singular with an s. Both may be several words, such as
    "active endpoint".
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_few(texts: Iterable[str]) -> str:
    """Return the first three texts, separated by commas; append `…` if there are more."""
    some = list(texts)
    return ", ".join(some[:3]) + (", …" if some[3:] else "")


def warn(sentence: str) -> None:
    """Print a warning, of at most limits.LINE characters, to standard error."""
    print(shortened(one_line(sentence), LINE), file=sys.stderr)


def warn_of_each(problems: Sequence[Any]) -> None:
    """Print a warning for each of `problems`, of which there may be very many: for the first REPORTED, and a count.

    `str()` of a problem is a sentence.
    """
    for problem in problems[:REPORTED]:
        warn(f"Warning: {problem}")
    if problems[REPORTED:]:
        warn(f"Warning: there are {quantity(len(problems) - REPORTED, 'more problem')} of this kind.")


def report_discarded(debug: bool) -> None:
    """From now on, report an exception that Python discards (in a finalizer, for example), or that ends a thread.

    The report is one line to standard error, with `debug` after a traceback. A KeyboardInterrupt is not reported: it is
    raised again (see cli/main.py).
    """

    def report(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            return
        if debug:
            import traceback

            traceback.print_exception(lost.exc_type, lost.exc_value, lost.exc_traceback)
        name = lost.exc_type.__name__
        warn(f"Internal error ({name}: {lost.exc_value}); run again with --debug to see where.")

    sys.unraisablehook = threading.excepthook = report
