"""Which messages travel at the same time: permutations of the workers.

All devices run one program: a message is as long for all of them as for the one
that has most to say. Where each has as much for the worker d places on, for
every d, one permutation a distance loses nothing. Where it differs (12 heads on
8 workers: one worker has three fragments for its neighbour, the next one two
for one neighbour and one for the other) what is left over is dealt out to
permutations in which all have something to say. There are always some: a square
table of counts whose rows and columns have equal sums is a sum of permutations
(Kőnig, 1916).

Letters in shapes: N workers.
"""

from collections.abc import Sequence

import numpy as np

Receivers = tuple[int, ...]  # of worker w's message: a permutation
Rows = list[list[int]]  # what worker w sends, shorter for some


def routes(
  sent: Sequence[Sequence[Sequence[int]]], even: bool = True
) -> dict[Receivers, Rows]:
  """Messages that bring everything to its receiver.

  Args:
    sent: (N, N, ...), what worker w has for worker v.
    even: False: one message a distance, however uneven.

  Returns:
    By receivers what each worker sends them. With `even` as many rows in all as
    the worker has that sends or gets most.

  >>> routes([[[], [1, 2], []], [[3], [], [4]], [[], [5], []]])
  {(0, 2, 1): [[], [4], [5]], (1, 0, 2): [[1, 2], [3], []]}
  """
  n = len(sent)
  left = [[[*x] for x in row] for row in sent]
  found: dict[Receivers, Rows] = {}

  def take(to: Receivers, m: int) -> None:
    rows = found.setdefault(to, [[] for _ in to])
    for w, v in enumerate(to):
      rows[w] += left[w][v][:m]
      left[w][v] = left[w][v][m:]

  for d in range(1, n):
    to = tuple((w + d) % n for w in range(n))
    counts = [len(left[w][v]) for w, v in enumerate(to)]
    m = min(counts) if even else max(counts)
    if m:
      take(to, m)
  while any(map(any, left)):
    table = _filled(np.array([[len(x) for x in row] for row in left]))
    to = _permutation(table > 0)
    take(to, min(table[w, v] for w, v in enumerate(to)))
  return found


def _filled(counts: np.ndarray) -> np.ndarray:
  """(N, N) with more, so that all rows and columns have the largest sum."""
  counts = counts.copy()
  wanted = max(counts.sum(0).max(), counts.sum(1).max())
  for w in range(len(counts)):
    for v in range(len(counts)):
      room = wanted - max(counts[w].sum(), counts[:, v].sum())
      counts[w, v] += room
  return counts


def _permutation(allowed: np.ndarray) -> Receivers:
  """One of allowed (N, N) places, a row and a column each; there is one."""
  n = len(allowed)
  sender = [-1] * n

  def place(w: int, seen: set[int]) -> bool:
    for v in np.flatnonzero(allowed[w]).tolist():
      if v not in seen:
        seen.add(v)
        if sender[v] < 0 or place(sender[v], seen):
          sender[v] = w
          return True
    return False

  for w in range(n):
    place(w, set())
  return tuple(np.argsort(sender).tolist())
