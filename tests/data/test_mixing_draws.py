"""What mixing draws: lambda, CutMix's boxes and erased ones, by distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from distrain_jax.data import Mixing, mix, mixing

KEY = jax.random.key(3)
uniform = lambda *shape: np.random.default_rng(1).random(shape, np.float32)
betas = jax.jit(jax.vmap(mixing.symmetric_beta, (0, None)))


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.5, 1.0, 3.0, 1000.0])
def test_lambda_is_from_the_symmetric_beta_distribution(alpha):
  u = uniform(10000, 2)
  share = np.asarray(betas(u, alpha))
  assert share.min() >= 0 and share.max() <= 1
  # In float32, values within 2**-24 of an end are the end.
  inner = share[(share > 1e-6) & (share < 1 - 1e-6)]
  ends = scipy.stats.beta.cdf([1e-6, 1 - 1e-6], alpha, alpha)
  assert scipy.stats.binomtest(len(inner), 10000, np.ptp(ends)).pvalue > 0.01
  cdf = lambda x: (
    (scipy.stats.beta.cdf(x, alpha, alpha) - ends[0]) / np.ptp(ends)
  )
  assert scipy.stats.kstest(inner, cdf).pvalue > 0.01


def test_a_draw_of_exactly_zero_gives_a_number():
  u = jnp.asarray([[0.0, 0.0], [0.0, 0.25], [0.0, 0.5], [1 - 2**-24, 0.1]])
  share = betas(u, 0.5)
  assert np.isfinite(share).all() and share[0] == 1 and share[2] == 0


def test_a_box_that_meets_no_border_has_the_share_it_was_asked_for():
  box = jax.vmap(lambda u: mixing.cut_box(u, jnp.float32(0.75), 16, 32))
  boxes = np.asarray(jax.jit(box)(uniform(400, 2)))
  area = boxes.sum((1, 2))
  inside = ~(boxes[:, [0, -1]].any((1, 2)) | boxes[:, :, [0, -1]].any((1, 2)))
  assert set(area[inside]) == {16 * 32 // 4}
  assert area.max() == 16 * 32 // 4 and 0.1 < inside.mean() < 0.4
  # A corner keeps a quarter of a box that is centred there, of 8 x 16.
  assert area.min() == 4 * 8


def test_erasing_hides_boxes_of_the_sizes_published_at_its_rate():
  image = jnp.ones((3000, 20, 30, 1))
  batch = {"image": image, "label": jnp.zeros(3000, jnp.int32)}
  program = jax.jit(lambda b: mix(b, KEY, Mixing(erasing=0.3), 2)["image"])
  new = np.asarray(program(batch))[..., 0]
  assert set(np.unique(new)) == {0, 1}
  hidden = new[(new == 0).any((1, 2))] == 0
  assert abs(len(hidden) / 3000 - 0.3) < 4 * (0.21 / 3000) ** 0.5
  tall, wide = hidden.any(2).sum(1), hidden.any(1).sum(1)
  np.testing.assert_array_equal(hidden.sum((1, 2)), tall * wide)  # rectangles
  area = tall * wide / 600
  assert area.min() >= 0.015 and area.max() <= 0.36  # whole pixels
  # The largest area with the largest height fits no 20 rows: a little less.
  assert abs(area.mean() - 0.175) < 0.012
  ratio = np.log(tall / wide)
  assert np.abs(ratio).max() < np.log(3.3) + 0.5 and abs(ratio.mean()) < 0.1
  middle = hidden.mean(0)
  np.testing.assert_allclose(middle, middle[::-1, ::-1], atol=0.08)
