"""Tables fit a terminal: how they are wrapped, and that nothing is lost."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calicoctl import output
from calicoctl.limits import LINE
from calicoctl.output import first_few, fit, print_data, print_table, quantity, warn, warn_of_each

COLUMNS = ["Hostname", "Orchestrator ID", "Workload ID", "Endpoint ID", "Addresses", "MAC", "Profiles", "State"]
ROW = ["host1", "docker", "web", "8573cd44e783", "192.168.0.1\nfd80::1", "aa:bb:cc:dd:ee:01", "a\nb", "active"]
EXPENDABLE = ("MAC", "Orchestrator ID", "Endpoint ID")


def width_of(lines: list[list[str]]) -> int:
    """Return how wide the grid of these cells is, with its frame: `| a | b |`."""
    widths = [max(len(part) for cell in column for part in [*cell.splitlines(), ""]) for column in zip(*lines)]
    return sum(widths) + 3 * len(widths) + 1


def test_what_fits_is_left_as_it_is() -> None:
    lines = [COLUMNS, ROW]
    assert fit(lines, width_of(lines), EXPENDABLE) == (lines, [])


def test_headings_are_broken_before_a_column_is_left_out() -> None:
    (heading, row), left_out = fit([COLUMNS, ROW], 112, EXPENDABLE)
    assert left_out == [] and "Orchestrator\nID" in heading and row == ROW


def test_columns_are_left_out_before_a_word_is_broken() -> None:
    (heading, row), left_out = fit([COLUMNS, ROW], 80, EXPENDABLE)
    assert left_out == ["MAC", "Orchestrator ID"]
    assert heading == ["Hostname", "Workload ID", "Endpoint ID", "Addresses", "Profiles", "State"]
    assert row == [ROW[0], *ROW[2:5], *ROW[6:]]


def test_a_word_that_is_too_long_is_broken_at_its_hyphens_first() -> None:
    (_, row), left_out = fit([["Name", "State", "MAC"], ["-var-run-netns-blue", "it is-so", "aa:bb"]], 30, ["MAC"])
    assert (row, left_out) == (["-var-run-\nnetns-blue", "it\nis-so", "aa:bb"], [])


WORDS = st.lists(st.from_regex(r"[a-z:.-]{1,30}", fullmatch=True), max_size=4).map(" ".join)
TABLES = st.integers(1, 6).flatmap(
    lambda columns: st.lists(st.lists(WORDS, min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@given(TABLES, st.integers(25, 120))
def test_no_line_is_wider_and_nothing_is_lost(lines: list[list[str]], width: int) -> None:
    fitted, left_out = fit(lines, width)
    assert left_out == [] and width_of(fitted) <= width
    for line, before in zip(fitted, lines):
        assert ["".join(cell.split()) for cell in line] == ["".join(cell.split()) for cell in before]


CELLS = st.lists(st.text("ab -\t日é", max_size=12), max_size=3).map("\n".join)


@given(st.lists(st.tuples(CELLS, CELLS, st.none() | st.integers(0, 10**9)), max_size=9), st.none() | st.integers(3, 9))
def test_a_table_that_is_formatted_in_parts_is_the_same(rows: list[tuple[object, ...]], widest: int | None) -> None:
    texts = []
    for part in (6, 9, 1500):
        with mock.patch.object(output, "PART", part), redirect_stdout(StringIO()) as printed:
            print_table(["Name", "名前", "Number"], rows, widest)
        texts.append(printed.getvalue())
    assert texts[0] == texts[1] == texts[2]


def test_a_sentence_lists_three_at_most() -> None:
    assert [first_few("abcd"[:count]) for count in range(5)] == ["", "a", "a, b", "a, b, c", "a, b, c, …"]


def test_a_number_has_its_noun_in_the_singular_or_the_plural() -> None:
    assert [quantity(n, "active endpoint") for n in (0, 1, 2)] == [
        "0 active endpoints",
        "1 active endpoint",
        "2 active endpoints",
    ]
    assert [quantity(n, "address", "addresses") for n in (1, 2)] == ["1 address", "2 addresses"]


@pytest.mark.parametrize("form", ["json", "yaml"])
@pytest.mark.parametrize("items", [[], [1], [{"a": [1, "two\nlines"], "b": {}}, {"c": None}]])
def test_an_iterator_is_printed_as_an_array(items: list[Any], form: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_data(iter(items), form)
    printed = capsys.readouterr().out
    print_data(items, form)
    assert printed == capsys.readouterr().out
    print_data({"first": iter(items), "second": [1, {"a": "b"}], "third": iter(items)}, form)
    printed = capsys.readouterr().out
    print_data({"first": items, "second": [1, {"a": "b"}], "third": items}, form)
    assert printed == capsys.readouterr().out


def test_warnings_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever may write to the store can have thousands of keys warned of."""
    warn_of_each([f"key {number}" for number in range(100)])
    assert capsys.readouterr().err.splitlines() == [f"Warning: key {number}" for number in range(100)]
    warn_of_each(["x"] * 40_000)
    assert capsys.readouterr().err.splitlines()[100:] == ["Warning: there are 39900 more problems of this kind."]


def test_a_cell_without_end_does_not_make_every_row_as_wide() -> None:
    with redirect_stdout(StringIO()) as said:
        print_table(["Name"], [["x" * 10**6 + "\nend"], *([f"web{number}"] for number in range(50))])
    lines = said.getvalue().splitlines()
    assert (
        max(map(len, lines)) <= LINE + 4 and any("…" in line for line in lines) and any("end" in line for line in lines)
    )


def test_a_warning_that_quotes_a_value_without_end_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    warn("\x1b" * 10**5 + "; fix or delete it")
    said = capsys.readouterr().err
    assert len(said) <= LINE + 1 and said.startswith("\\x1b") and said.endswith("; fix or delete it\n")
