"""Settings of members: the grid, stacking, and what is refused."""

import numpy as np
import pytest

from distrain_jax.data import Mixing, mixing_grid, per_member


def test_settings_are_stacked_by_member():
  stacked = per_member([Mixing(mixup=0.5), Mixing(erasing=1, smoothing=0.25)])
  assert [x.tolist() for x in stacked] == [[0.5, 0], [0, 0], [0, 0.25], [0, 1]]
  assert {x.dtype for x in stacked} == {np.dtype(np.float32)}


def test_the_grid_gives_a_member_its_own_whoever_else_there_is():
  every = mixing_grid(81, seed=5)
  assert len(set(every)) == 81
  values = [{getattr(m, name) for m in every} for name in Mixing._fields]
  assert values == [{0, 0.5, 1}, {0, 0.5, 1}, {0, 0.05, 0.1}, {0, 0.15, 0.35}]
  assert mixing_grid((2, 0), seed=5) == [every[2], every[0]]
  assert mixing_grid(83, seed=5)[81:] == every[:2]
  assert mixing_grid(81, seed=6) != every
  imagenet = mixing_grid(4, 0, mixup=(0, 0.1), cutmix=(0,), erasing=(0,))
  assert {m.mixup for m in imagenet} <= {0, 0.1}


@pytest.mark.parametrize("seed", [-1, 0.5, 2**63])
def test_a_bad_seed_is_refused(seed):
  with pytest.raises(ValueError, match="must be an integer in"):
    mixing_grid(3, seed)


@pytest.mark.parametrize(
  "settings, message",
  [
    ([], "at least one Mixing"),
    ([Mixing(), Mixing(mixup=-1)], r"settings\[1\].*mixup=-1 must be an alpha"),
    ([Mixing(cutmix=float("inf"))], "cutmix=inf must be an alpha, finite"),
    ([Mixing(smoothing=1.0)], r"smoothing=1.0 must be a fraction in \[0, 1\)"),
    ([Mixing(erasing=1.5)], r"erasing=1.5 must be a probability in \[0, 1\]"),
    ([Mixing(erasing=True)], "erasing=True must be"),
    ([Mixing(mixup="0.5")], "mixup='0.5' must be"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    per_member(settings)
