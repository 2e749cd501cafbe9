"""Tables line up in a terminal and are escaped in a notebook."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain_jax.inspect import table

HEADERS = ("method", "bytes", "share")
ROWS = [("ddp", 182868, 0.5), ("zero1", 917, 0.123456), ("none", None, None)]


def test_columns_line_up_and_numbers_end_where_their_header_ends():
  assert table.render(HEADERS, ROWS, footer=[("all", 183785, 1)]).split(
    "\n"
  ) == [
    "method    bytes   share",
    "------  -------  ------",
    "ddp     182,868     0.5",
    "zero1       917  0.1235",
    "none",
    "------  -------  ------",
    "all     183,785       1",
  ]


def test_align_says_how_each_column_stands():
  text = table.render(("a", "b", "c"), [("1", "22", "4444")], "rlc")
  assert text.split("\n") == ["a  b    c", "-  --  ----", "1  22  4444"]
  text = table.render(("aaa", "bbb", "ccc"), [("1", "2", "3")], "rlc")
  assert text.split("\n")[2] == "  1  2     3"


def test_numbers_of_numpy_are_numbers_and_truth_values_are_text():
  rows = [(np.int64(12345), np.float32(0.25), True, np.bool_(False))]
  assert (
    table.render("abcd", rows).split("\n")[2] == "12,345  0.25  True  False"
  )


def test_a_cell_is_one_line_and_wide_characters_take_two_columns():
  lines = table.render(("x", "y"), [("a\nb", 1), ("日本", 2), ("e\u0301", 3)])
  assert lines.split("\n")[2:] == ["a b   1", "日本  2", "e\u0301     3"]


def test_a_table_without_rows_is_its_headers():
  assert table.render(("a", "b"), []) == "a  b\n-  -"


def test_html_escapes_and_has_the_same_cells():
  rows = [("<script>&", 1234)]
  text = table.render_html(("a<b", "n"), rows, footer=[("sum", 1234)])
  root = ElementTree.fromstring(text)  # well formed
  cells = [[cell.text for cell in row] for row in root.iter("tr")]
  assert cells == [["a<b", "n"], ["<script>&", "1,234"], ["sum", "1,234"]]
  assert root.find("tbody/tr")[1].get("style") == "text-align: right"


@pytest.mark.parametrize("form", [table.render, table.render_html])
def test_what_does_not_fit_the_headers_is_refused(form):
  with pytest.raises(ValueError, match=r"\['x'\] has 1 cells.*2 headers: a, b"):
    form(("a", "b"), [("x",)])
  with pytest.raises(ValueError, match=r"2 columns.*got 'l'"):
    form(("a", "b"), [], "l")
  with pytest.raises(ValueError, match="'l', 'r' or 'c'; got 'lx'"):
    form(("a", "b"), [], "lx")


@pytest.mark.parametrize(
  ("n", "text"),
  [
    (0, "0 B"),
    (1023, "1,023 B"),
    (1024, "1.00 KiB"),
    (-1536, "-1.50 KiB"),
    (2**20 - 1, "1.00 MiB"),
    (2**30 * 1.5, "1.50 GiB"),
    (2**40, "1.00 TiB"),
    (2**62, "4,096.00 PiB"),
  ],
)
def test_bytes_are_said_in_a_unit_that_fits(n, text):
  assert table.bytes_text(n) == text


@given(st.integers(0, 2**59))
def test_a_size_reads_back_within_its_last_digit(n):
  number, unit = table.bytes_text(n).split()
  size = 1024 ** table.UNITS.index(unit)
  assert abs(float(number.replace(",", "")) - n / size) <= 0.005 + 1e-9
  assert float(number.replace(",", "")) < 1024
