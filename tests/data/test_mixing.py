"""Mixed batches against NumPy, and what holds whatever was drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.data import Mixing, mix, mixing, per_member
from distrain_jax.data.mixing import mixing_loss
from distrain_jax.method import StatefulLoss, stateful

CLASSES, B, H, W = 7, 6, 9, 8
RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.normal(size=(B, H, W, 2)).astype(np.float32),
  "label": RNG.integers(0, CLASSES, B).astype(np.int32),
}
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[BATCH["label"]]
KEY = jax.random.key(3)
ALL = Mixing(mixup=0.5, cutmix=1.0, smoothing=0.1, erasing=0.5)
MEMBERS = [
  ALL,
  Mixing(),
  Mixing(mixup=1.0),
  Mixing(cutmix=1.0, erasing=1.0),
]
traced = jax.jit(functools.partial(mix, classes=CLASSES))


@functools.cache
def many(settings, count=2000):
  """(count, ...) batches of rows that tell themselves: own pixels are 1."""
  rows = {
    "image": jnp.asarray([1.0, 1.0, 0.0, 0.0])[:, None, None, None]
    * jnp.ones((4, H, W, 1)),
    "label": jnp.asarray([0, 0, 1, 1]),
  }
  keys = jax.random.split(KEY, count)
  one = lambda key: mix(rows, key, settings, 2)
  return jax.device_get(jax.jit(jax.vmap(one))(keys))


def oracle(batch, key, m):
  """One pixel and one row at a time; draws as the key's purposes give them."""
  draw = lambda purpose, shape: np.asarray(
    jax.random.uniform(jax.random.fold_in(key, purpose), shape), np.float64
  )
  image, b = batch["image"].astype(np.float64), len(batch["image"])
  if m.erasing:
    *u, hit = draw(mixing.ERASE, (41, b))
    u, hit = np.reshape(u, (4, 10, b)), hit < m.erasing
    for row in np.flatnonzero(hit):
      for area, ratio, y, x in u[:, :, row].T:
        area = H * W * (0.02 + 0.31 * area)
        ratio = 0.3 * (3.3 / 0.3) ** ratio
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if h < H and w < W:
          top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
          image[row, top : top + h, left : left + w] = 0
          break
  label = np.eye(CLASSES)[batch["label"]]
  coin, u, v, cy, cx = draw(mixing.BLEND, (5,))
  cut = m.cutmix > 0 and (m.mixup == 0 or coin < 0.5)
  mixed, labels = image.copy(), label.copy()
  if m.mixup or m.cutmix:
    alpha = m.cutmix if cut else m.mixup
    share = (u ** (-1 / alpha) - 1) ** 0.5 * np.cos(2 * np.pi * v)
    share = 0.5 + 0.5 * share / (1 + share**2) ** 0.5
    if cut:
      h, w = int(H * (1 - share) ** 0.5), int(W * (1 - share) ** 0.5)
      top, left = int(cy * H) - h // 2, int(cx * W) - w // 2
      inside = [
        (y, x)
        for y in range(max(top, 0), min(top + h, H))
        for x in range(max(left, 0), min(left + w, W))
      ]
      for row in range(b):
        for y, x in inside:
          mixed[row, y, x] = image[b - 1 - row, y, x]
      share = 1 - len(inside) / (H * W)
    else:
      for row in range(b):
        mixed[row] = share * image[row] + (1 - share) * image[b - 1 - row]
    for row in range(b):
      labels[row] = share * label[row] + (1 - share) * label[b - 1 - row]
  return mixed, (1 - m.smoothing) * labels + m.smoothing / CLASSES


@pytest.mark.parametrize("settings", MEMBERS, ids=range(4))
def test_a_mixed_batch_is_the_oracles(settings):
  for seed in range(8):
    key = jax.random.key(seed)
    image, label = oracle(BATCH, key, settings)
    new = traced(BATCH, key, settings)
    assert new["image"].dtype == new["label"].dtype == jnp.float32
    np.testing.assert_allclose(new["image"], image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["label"], label, rtol=1e-5, atol=1e-6)


known = jax.jit(lambda batch, key, _: mix(batch, key, Mixing(), CLASSES))


@pytest.mark.parametrize("apply", [traced, known])
def test_all_off_is_the_identity_traced_or_not(apply):
  new = apply(BATCH | {"weight": np.ones(B)}, KEY, Mixing())
  np.testing.assert_array_equal(new["image"], BATCH["image"])
  np.testing.assert_array_equal(new["label"], ONE_HOT)
  np.testing.assert_array_equal(new["weight"], np.ones(B))


def test_what_is_off_costs_nothing():
  words = {"reverse", "log", "cosine", "shift_left"}  # the last: random bits
  used = lambda program: {
    word for word in words if f"stablehlo.{word}" in program.as_text()
  }
  assert used(traced.lower(BATCH, KEY, ALL)) == words
  assert used(known.lower(BATCH, KEY, None)) == set()


def test_images_keep_their_dtype():
  image = jnp.asarray(BATCH["image"], jnp.bfloat16)
  new = jax.eval_shape(traced, BATCH | {"image": image}, KEY, ALL)
  assert new["image"].dtype == jnp.bfloat16
  assert new["label"].dtype == jnp.float32


def test_labels_stay_probabilities():
  for seed in range(5):
    label = traced(BATCH, jax.random.key(seed), ALL)["label"]
    assert label.shape == (B, CLASSES) and (label > 0).all()
    np.testing.assert_allclose(label.sum(1), 1, rtol=1e-6)


def test_labels_that_are_probabilities_already_are_mixed_on():
  settings = ALL._replace(erasing=0.0)
  soft = traced(BATCH | {"label": ONE_HOT}, KEY, settings)
  whole = traced(BATCH, KEY, settings)
  jax.tree.map(np.testing.assert_array_equal, soft, whole)


def test_a_label_beyond_the_classes_is_no_probability():
  for bad in (-1, CLASSES):
    batch = BATCH | {"label": np.full(B, bad, np.int32)}
    assert np.isnan(mix(batch, KEY, Mixing(), CLASSES)["label"]).all()


def test_cutmix_moves_one_box_whose_mass_is_the_partners_share():
  new = many(Mixing(cutmix=1.0))
  own = new["image"][:, 0, :, :, 0]  # 1 where row 0 kept its own pixel
  assert set(np.unique(own)) == {0, 1}
  np.testing.assert_array_equal(new["image"][:, 3, :, :, 0], 1 - own)
  np.testing.assert_allclose(own.mean((1, 2)), new["label"][:, 0, 0], atol=1e-6)
  for pixels in own:
    rows, columns = (pixels == 0).any(1), (pixels == 0).any(0)
    assert (pixels == 0).sum() == rows.sum() * columns.sum()
    assert np.abs(np.diff(rows)).sum() <= 2  # together


def test_mixup_blends_all_pixels_and_labels_with_one_lambda():
  new = many(Mixing(mixup=0.5))
  share = new["label"][:, 0, 0]
  for row, own in ((0, share), (1, share), (2, 1 - share), (3, 1 - share)):
    pixels = new["image"][:, row].reshape(len(share), -1)
    np.testing.assert_allclose(pixels, own[:, None] + 0 * pixels, atol=1e-6)
    np.testing.assert_allclose(new["label"][:, row, 0], own, atol=1e-6)
  assert len(np.unique(share)) == len(share)  # each batch its own


def test_with_both_on_a_coin_decides():
  image = many(Mixing(mixup=1.0, cutmix=1.0))["image"]
  cut = np.isin(image, [0, 1]).all((1, 2, 3, 4))
  assert abs(cut.mean() - 0.5) < 4 * 0.5 / len(cut) ** 0.5


def close(a, b):
  equal = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(equal, a, b)


def in_turn(keys):
  """Each member's batch, made alone."""
  batches = [traced(BATCH, key, MEMBERS[i % 4]) for i, key in enumerate(keys)]
  return jax.tree.map(lambda *x: np.stack(x), *batches)


def test_members_at_once_are_members_in_turn():
  keys = jax.random.split(KEY, 4)
  one = lambda key, m: mix(BATCH, key, m, CLASSES)
  at_once = jax.jit(jax.vmap(one))(keys, per_member(MEMBERS))
  close(at_once, in_turn(keys))


def test_settings_are_values_so_that_other_ones_compile_nothing():
  calls = []

  @jax.jit
  def one(m):
    calls.append(1)
    return mix(BATCH, KEY, m, CLASSES)

  for m in (ALL, ALL._replace(mixup=1.0), Mixing()):
    one(m)
  assert len(calls) == 1


def plain(params, batch, key):
  """A loss that shows what it was given."""
  return params, {"batch": batch, "drawn": jax.random.uniform(key)}


def by_vmap(fn, keys, axis="population"):
  return jax.jit(jax.vmap(fn, axis_name=axis))(keys)


def by_mesh(fn, keys):
  mesh = spmd.make_mesh({"population": len(keys)})
  one = lambda key: jax.tree.map(lambda x: x[None], fn(key[0]))
  each = P("population")
  over = jax.shard_map(one, mesh=mesh, in_specs=each, out_specs=each)
  return jax.jit(over)(keys)


def test_a_worker_mixes_in_its_own_way_on_any_number_of_devices():
  loss_fn = mixing_loss(plain, MEMBERS, CLASSES)
  one = lambda key: loss_fn(jnp.float32(2.0), BATCH, key)[1]
  keys = jax.random.split(KEY, 8)  # twice as many as settings
  for_batch, for_model = (
    [jax.random.fold_in(key, purpose) for key in keys]
    for purpose in (mixing.BATCH, mixing.MODEL)
  )
  # What the model draws has nothing to do with how its batch is mixed.
  words = lambda keys: {jax.random.key_data(k).tobytes() for k in keys}
  assert not words(for_batch) & words([*for_model, *keys])
  expected = {"batch": in_turn(for_batch)}
  expected["drawn"] = np.stack([jax.random.uniform(k) for k in for_model])
  close(by_vmap(one, keys), expected)
  close(by_mesh(one, keys), expected)


def test_a_stateful_loss_keeps_its_state_and_its_rule():
  def fn(params, model_state, batch, key):
    loss, aux = plain(params, batch, key)
    return loss, (aux, model_state + 1)

  settings = [Mixing(smoothing=0.1), Mixing(smoothing=0.2)]
  loss_fn = mixing_loss(stateful(fn, stats="local"), settings, CLASSES, "i")
  assert isinstance(loss_fn, StatefulLoss) and loss_fn.stats == "local"
  one = lambda key: loss_fn.fn(2.0, jnp.float32(4.0), BATCH, key)
  loss, (aux, state) = by_vmap(one, jax.random.split(KEY), "i")
  assert loss.tolist() == [2.0, 2.0] and state.tolist() == [5.0, 5.0]
  for label, part in zip(aux["batch"]["label"], (0.1, 0.2)):
    np.testing.assert_allclose(label, (1 - part) * ONE_HOT + part / CLASSES)


def test_several_members_a_device_are_counted_over_both_axes(mesh):
  ways = [Mixing(smoothing=part) for part in (0.1, 0.2, 0.3, 0.4)]
  loss_fn = mixing_loss(plain, ways, CLASSES, axis=("data", "inner"))
  one = lambda key: loss_fn(2.0, BATCH, key)[1]["batch"]["label"]
  inner = jax.vmap(one, axis_name="inner")
  over = jax.shard_map(
    inner, mesh=mesh(2), in_specs=P("data"), out_specs=P("data")
  )
  labels = jax.jit(over)(jax.random.split(KEY, 4))
  for label, m in zip(labels, ways):
    part = m.smoothing
    np.testing.assert_allclose(label, (1 - part) * ONE_HOT + part / CLASSES)


@pytest.mark.parametrize("loss_fn", [plain, stateful(plain)])
def test_all_off_is_the_loss_itself(loss_fn):
  assert mixing_loss(loss_fn, [Mixing(), Mixing(0, 0)], CLASSES) is loss_fn


@pytest.mark.parametrize(
  "batch",
  [
    {"image": BATCH["image"].astype(np.uint8), "label": BATCH["label"]},
    {"tokens": np.zeros((2, 3), np.int32)},
    {"image": BATCH["image"]},
    BATCH | {"label": np.zeros((B, CLASSES + 1), np.float32)},
    BATCH | {"label": np.zeros(B, np.float32)},
  ],
)
def test_bad_batches_are_refused(batch):
  with pytest.raises(ValueError, match=r"needs 'image'.*got \{.*Normalise"):
    mix(batch, KEY, ALL, CLASSES)
