"""curves.png has what was logged, and is never empty."""

import numpy as np
import pytest
from matplotlib import image

from distrain_jax.train import curves


def ink(path):
  """The share of pixels that are not white."""
  pixels = image.imread(path)[..., :3]
  return np.mean((pixels < 0.99).any(-1))


LINES = [
  {"step": 1, "loss": 2.0, "grad_norm": 1.0},
  {"step": 2, "loss": 1.0, "grad_norm": 0.5},
  {"step": 2, "validation_loss": 1.5, "validation_accuracy": 0.5},
  {"step": 2, "test_loss": 1.5, "test_accuracy": 0.5},
]


def test_there_is_a_panel_for_what_was_logged(tmp_path):
  sizes = {}
  for name, lines in {
    "one": LINES[:0],
    "two": LINES[:2],
    "four": LINES,
  }.items():
    path = tmp_path / f"{name}.png"
    curves.draw({"mine": lines}, path, title="title")
    sizes[name] = image.imread(path).shape[1]
    assert ink(path) > 0.01
  # Nothing yet is one empty panel; test numbers are one point, and no curve.
  assert sizes["two"] == 2 * sizes["one"]
  assert sizes["four"] == 4 * sizes["one"]


def test_the_curve_itself_is_drawn(tmp_path):
  for i, lines in enumerate([LINES[:0], LINES[:2]]):
    curves.draw({"mine": lines}, tmp_path / f"{i}.png")
  colours = [
    {tuple(c) for c in image.imread(tmp_path / f"{i}.png").reshape(-1, 4)}
    for i in range(2)
  ]
  blue = pytest.approx((31 / 255, 119 / 255, 180 / 255, 1.0), abs=0.01)
  assert not any(c == blue for c in colours[0])
  assert any(c == blue for c in colours[1])


def test_several_runs_share_the_panels_and_nan_leaves_a_gap(tmp_path):
  other = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}]
  runs = {"one": LINES, "other": other, "none yet": []}
  curves.draw(runs, tmp_path / "both.png")
  assert ink(tmp_path / "both.png") > 0.01
