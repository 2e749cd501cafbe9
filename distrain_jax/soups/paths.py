"""Straight lines between models: the loss along them, and its barrier.

Two definitions of a barrier are in use; with L(t) the loss of (1-t) a + t b:

- "line": max over t of L(t) - ((1-t) L(0) + t L(1)), of Entezari et al., 2021,
  https://arxiv.org/abs/2110.06296. Never below 0.
- "mean": max over t of L(t) - (L(0) + L(1)) / 2, of Frankle et al., 2019,
  https://arxiv.org/abs/1912.05671. Where the ends differ it is at least half of
  the difference.

Both agree where the ends' losses do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distrain_jax.soups import trees

Loss = Callable[[Any], float]  # (model) -> e.g. the mean over a split
AGAINST = ("line", "mean")


class Path(NamedTuple):
  """The loss on the way from a model a to a model b."""

  t: np.ndarray  # (k,), from 0 at a to 1 at b
  loss: np.ndarray  # (k,)


def interpolate(a: Any, b: Any, t: float) -> Any:
  """(1 - t) a + t b, leaf by leaf, computed as `uniform` does.

  t=0 gives a and t=1 gives b, the very objects.

  Raises:
    ValueError: if t is not in [0, 1], or as `uniform`.
  """
  check_t("interpolate", [t])
  trees.check("interpolate", [a, b])
  return _between(a, b, t)


def path(
  a: Any, b: Any, loss: Loss, points: int | Sequence[float] = 11
) -> Path:
  """The loss on the straight line from a to b.

  Args:
    a, b: two models, as for `uniform`.
    loss: (model) -> float. Of a model with BatchNorm it may estimate the
      statistics anew first, unless it is given a or b itself: in between they
      are nobody's.
    points: how many values of t, equally far apart with both ends; or the
      values, each in [0, 1].

  Raises:
    ValueError: if points are not as said, or as `uniform`.
  """
  ts = _points("path", points)
  trees.check("path", [a, b])
  losses = [float(loss(_between(a, b, float(t)))) for t in ts]
  return Path(ts, np.array(losses))


def layer_paths(
  a: Any,
  b: Any,
  loss: Loss,
  points: int | Sequence[float] = 5,
  *,
  depth: int | None = None,
) -> dict[str, Path]:
  """A path a layer: only its values go from a's to b's, all others are a's.

  A layer without which a loses little is one where the members agree, or which
  matters little. The ends are compared with a, not b, whose other layers are
  missing: L(1) may be high itself.

  Args:
    a, b, loss, points: as for `path`.
    depth: how deep to tell layers apart; see `layers`.

  Returns:
    The layer's name -> its path, in the order of the tree.

  Raises:
    ValueError: as `path` and `layers`.
  """
  ts = _points("layer_paths", points)
  trees.check("layer_paths", [a, b])
  found, start = {}, None
  for name, own in trees.layers(a, depth).items():
    losses = []
    for t in ts:
      if t == 0 and start is not None:  # a itself, whichever the layer
        losses.append(start)
        continue
      model = a
      if t != 0:
        model = trees.replace(a, own, _between(a, b, float(t)))
      losses.append(float(loss(model)))
      start = losses[-1] if t == 0 else start
    found[name] = Path(ts, np.array(losses))
  return found


def barrier(along: Path, against: str = "line") -> float:
  """How far the loss rises between two models; see the file's head.

  Args:
    along: what `path` returned, with both ends among its points.
    against: "line" or "mean": what the loss is compared with.

  Returns:
    A float in the loss's unit; NaN if some loss is NaN.

  Raises:
    ValueError: if against is neither, or an end is missing.

  >>> barrier(Path(np.array([0, 0.5, 1]), np.array([1.0, 5.0, 3.0])))
  3.0
  """
  if against not in AGAINST:
    raise ValueError(
      f"barrier: `against` is one of {', '.join(AGAINST)}; got {against!r}."
    )
  t, loss = np.asarray(along.t), np.asarray(along.loss)
  if not {0.0, 1.0} <= set(t.tolist()):
    raise ValueError(
      "barrier: a path needs the losses of both ends, t=0 and t=1; its t are "
      f"{t.tolist()}."
    )
  first, last = loss[t == 0][0], loss[t == 1][0]
  line = (1 - t) * first + t * last
  if against == "mean":
    line = (first + last) / 2
  return float(np.max(loss - line))


def check_t(where: str, ts: Sequence[float]) -> None:
  """A ValueError unless all t are in [0, 1]."""
  for t in ts:
    if not 0 <= t <= 1:
      raise ValueError(
        f"{where}: t is in [0, 1], from the first model to the second; got "
        f"{t!r}. Beyond them use weighted([a, b], [1 - t, t])."
      )


def _points(where, points) -> np.ndarray:
  """The values of t."""
  if np.ndim(points) == 0:
    if not points >= 2 or points != int(points):
      raise ValueError(
        f"{where}: `points` is a whole number from 2, or the values of t; got "
        f"{points!r}."
      )
    return np.linspace(0, 1, int(points))
  check_t(where, points)
  if not len(points):
    raise ValueError(f"{where}: `points` is empty; pass at least one t.")
  return np.asarray(points, float)


def _between(a, b, t: float):
  """From the nearer end, so that both halves are computed alike."""
  if t in (0, 1):
    return b if t else a
  if t <= 0.5:
    return trees.average([a, b], [1 - t, t])
  # What is no float is equal in both; `average` keeps the first's.
  return trees.average([b, a], [t, 1 - t])
