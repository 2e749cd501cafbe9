"""Tables for people: aligned text for a terminal, HTML for a notebook."""

import html
import unicodedata
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

Row = Sequence[Any]
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
CSS = {"l": "left", "r": "right", "c": "center"}


def bytes_text(n: float) -> str:
  """Bytes in the unit of 1024^k in which they are at least 1.

  >>> bytes_text(512), bytes_text(3 * 2**29), bytes_text(1024**2 - 1)
  ('512 B', '1.50 GiB', '1.00 MiB')
  """
  size = abs(n)
  for unit in UNITS:
    # As printed: 1023.999 KiB would read "1024.00 KiB".
    digits = 0 if unit == "B" else 2
    if round(size, digits) < 1024 or unit == UNITS[-1]:
      return f"{'-' if n < 0 else ''}{size:,.{digits}f} {unit}"
    size /= 1024
  raise AssertionError("unreachable: the last unit takes any size")


def render(
  headers: Sequence[str],
  rows: Sequence[Row],
  align: str | None = None,
  *,
  footer: Sequence[Row] = (),
) -> str:
  """A table in columns of plain text, without trailing spaces.

  Args:
    headers: one a column.
    rows: cells may be text; whole numbers get thousands separators, others
      four significant digits, and None is empty.
    align: a letter a column, "l", "r" or "c"; None: columns that hold numbers
      and nothing else to the right, others to the left.
    footer: rows below a rule, such as totals.

  Raises:
    ValueError: a row or `align` of another length than headers.

  >>> print(render(["leaf", "size"], [["w", 4096], ["bias", 64]]))
  leaf   size
  ----  -----
  w     4,096
  bias     64
  """
  align = _check(headers, [*rows, *footer], align)
  head, body, foot = (
    [*map(_texts, part)] for part in ([headers], rows, footer)
  )
  columns = list(zip(*head, *body, *foot))
  widths = [max(map(_width, column)) for column in columns]
  rule = ["-" * width for width in widths]
  lines = [*head, rule, *body, *([rule, *foot] if foot else [])]
  return "\n".join(
    "  ".join(map(_pad, line, widths, align)).rstrip() for line in lines
  )


def render_html(
  headers: Sequence[str],
  rows: Sequence[Row],
  align: str | None = None,
  *,
  footer: Sequence[Row] = (),
) -> str:
  """As `render`, as one HTML table; every cell is escaped."""
  align = _check(headers, [*rows, *footer], align)

  def line(row, tag):
    cells = (
      f'<{tag} style="text-align: {CSS[a]}">{html.escape(text)}</{tag}>'
      for text, a in zip(_texts(row), align)
    )
    return f"<tr>{''.join(cells)}</tr>"

  parts = (
    ("thead", [headers], "th"),
    ("tbody", rows, "td"),
    ("tfoot", footer, "th"),
  )
  inside = (
    f"<{part}>{''.join(line(row, tag) for row in some)}</{part}>"
    for part, some, tag in parts
    if len(some)
  )
  return f"<table>{''.join(inside)}</table>"


def _check(headers, rows, align) -> str:
  """The letters of the columns."""
  for row in rows:
    if len(row) != len(headers):
      raise ValueError(
        f"table: the row {list(row)!r} has {len(row)} cells, but there are "
        f"{len(headers)} headers: {', '.join(map(str, headers))}."
      )
  if align is None:
    columns = [[row[i] for row in rows] for i in range(len(headers))]
    return "".join("r" if _numbers(column) else "l" for column in columns)
  if len(align) != len(headers) or set(align) - set(CSS):
    raise ValueError(
      f"table: `align` has a letter for each of the {len(headers)} columns, "
      f"'l', 'r' or 'c'; got {align!r}."
    )
  return align


def _numbers(column) -> bool:
  cells = [cell for cell in column if cell is not None]
  return bool(cells) and all(isinstance(cell, Real) for cell in cells)


def _texts(row) -> list[str]:
  return [_text(cell) for cell in row]


def _text(cell) -> str:
  if cell is None:
    return ""
  if isinstance(cell, Integral) and not isinstance(cell, bool):
    return f"{int(cell):,}"
  if isinstance(cell, Real) and not isinstance(cell, bool):
    return f"{float(cell):,.4g}"
  return " ".join(str(cell).splitlines())  # a row stays a line


def _width(text: str) -> int:
  """Columns on a terminal, where East Asian characters take two."""
  wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
  return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _pad(text: str, width: int, align: str) -> str:
  space = width - _width(text)
  left = {"l": 0, "r": space, "c": space // 2}[align]
  return " " * left + text + " " * (space - left)
