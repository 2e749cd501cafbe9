"""What counts as a whole number where an option is one."""

from numbers import Integral
from typing import Any


def is_whole(x: Any, least: int = 0) -> bool:
  """Whether x is a whole number from `least`; NumPy's are, True is none.

  >>> is_whole(3, 1), is_whole(0, 1), is_whole(True), is_whole(1.0)
  (True, False, False, False)
  """
  whole = isinstance(x, Integral) and not isinstance(x, bool)
  return whole and bool(x >= least)
