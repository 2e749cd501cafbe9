"""Members of a population, by number: who gets which rows of a batch.

A member's number, not its place, keys its data. So the numbers of those who
stay are the ones they had, whoever leaves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def numbers(members: int | Sequence[int]) -> list[int]:
  """Members' numbers: 0, 1, … if only told how many.

  Raises:
    ValueError: if there is none, or they are not distinct and from 0 on.
  """
  try:
    given = range(members) if _whole(members) else members
    chosen = [int(m) for m in given if _whole(m) and 0 <= m < 2**31]
    good = len(set(chosen)) == len(given) > 0
  except TypeError:
    good = False
  if not good:
    raise ValueError(
      f"members={members!r} is how many members a population has, at least 1, "
      "or their numbers, as (0, 2, 3): whole, from 0 on, none twice."
    )
  return chosen


def share(batch_size: int, members: Sequence[int]) -> int:
  """The rows of one member.

  Raises:
    ValueError: if the members cannot have equally many.
  """
  n = len(members)
  if batch_size % n:
    low = batch_size // n * n
    raise ValueError(
      f"batch_size={batch_size} is the global batch and must be a multiple of "
      f"the {n} members. Nearest: {low or n} or {low + n}."
    )
  return batch_size // n


def parts(rows: range, each: int, members: Sequence[int]):
  """Cuts rows of a batch by the member whose they are.

  Args:
    rows: of the global batch.
    each: rows a member.
    members: their numbers, in the order of their shares.

  Returns:
    [(member, the first row within its share, how many)], none of them empty.
  """
  found = []
  for place, member in enumerate(members):
    first = max(rows.start - place * each, 0)
    count = min(rows.stop - place * each, each) - first
    if count > 0:
      found.append((member, first, count))
  return found


def check_resumes(state: Mapping[str, Any], decides: Mapping[str, Any]) -> None:
  """Refuses a saved state that an iterator cannot go on from.

  Args:
    state: with "batch_size", "seed", "records" and "members"; older ones have
      no members and are of one.
    decides: the same of the iterator.

  Raises:
    ValueError: as `TrainIterator.set_state`.
  """
  was, now = _of_a_member(state), _of_a_member(decides)
  if was != now:
    raise ValueError(
      f"This state was saved by a data iterator with {was}; this one has "
      f"{now}. The order of a member's data depends on all three: resume with "
      "the same config, or start a new run. A population of another size keeps "
      "the rows of a member: its global batch grows or shrinks with it."
    )
  were, are = _members(state), _members(decides)
  new = set(are) - set(were)
  # A number above all of theirs is taken to be of one who joins.
  if new and not set(were) <= set(are) and min(new) < max(were):
    raise ValueError(
      f"This state was saved by a data iterator with members={were}; this one "
      f"has members={are}, so that some would go on with others' data. Give "
      "those who stay the numbers that they had, e.g. members="
      f"{were[: len(are)]}; who joins while others leave takes a number above."
    )


def _members(state: Mapping[str, Any]) -> list[int]:
  return list(state.get("members", [0]))


def _of_a_member(state: Mapping[str, Any]) -> dict[str, Any]:
  """What decides a member's data."""
  batch_size = state.get("batch_size")
  if batch_size is not None:
    batch_size //= len(_members(state))
  return {
    "batch_size of a member": batch_size,
    "seed": state.get("seed"),
    "records": state.get("records"),
  }


def _whole(x: Any) -> bool:
  return isinstance(x, int | np.integer) and not isinstance(x, bool)
