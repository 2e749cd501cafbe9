"""The coordinate check: flat under muP, growing without."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned, models
from distrain_jax.learned import meta

KEY = jax.random.key(0)


def build(make_tx, mup):
  def probe(width, key):
    net = meta.MLP(64, (width,) * 3, 10, mup)
    loss = lambda p, b: meta.cross_entropy(net.apply(p, b["x"]), b["y"])
    layers = lambda p, b: {
      f"layer {i}": x for i, x in enumerate(net.hidden(p, b["x"])[:-1])
    }
    tx = make_tx(net.multipliers())
    return learned.Probe(jax.jit(net.init)(key), loss, layers, tx)

  return probe


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 64)).astype(np.float32)
  return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 10, 64))}


@pytest.mark.full  # half a minute of compiling
def test_a_learned_rule_moves_all_widths_alike_under_mup_only(batch):
  theta = jax.jit(learned.init_theta)(KEY)
  made = lambda size: (
    lambda mup: learned.mulo(theta, mup=mup, step_mult=size, tile=10**6)
  )
  flat = learned.coord_check(build(made(0.01), True), (32, 256), batch, steps=6)
  grown = learned.coord_check(
    build(made(0.001), False), (32, 256), batch, steps=6
  )
  for ratio in flat.growth().values():
    assert 1 / 1.3 < ratio < 1.3
  assert grown.growth()["layer 2"] > 5
  assert flat.moved["layer 0"].shape == (2, 6)


@pytest.fixture(scope="module")
def adam(batch):
  mup = lambda mup: learned.mup_adamw(0.02, mup)
  return learned.coord_check(build(mup, True), (32, 256), batch, steps=6)


def test_adam_moves_all_widths_alike_under_mup_only(adam, batch):
  sp = lambda mup: optax.adam(1e-3)
  grown = learned.coord_check(build(sp, False), (32, 256), batch, steps=6)
  for ratio in adam.growth().values():
    assert 1 / 1.3 < ratio < 1.3
  assert grown.growth()["layer 2"] > 2


def test_a_picture_of_it(adam, tmp_path):
  path = tmp_path / "coordinates.png"
  learned.draw_coordinates({"muP": adam, "again": adam}, path)
  assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("widths", [(64,), (64, 32), (64, 64)])
def test_widths_that_show_nothing_are_refused(widths):
  with pytest.raises(ValueError, match=r"two or more, ascending"):
    learned.coord_check(None, widths, None)


def test_one_compilation_serves_all_seeds_and_their_mean_is_taken():
  traced = []

  def build(width, key):
    w = jax.random.normal(key, (3, width))
    layers = lambda p, b: {"y": b @ p["w"]}
    loss = lambda p, b: traced.append(width) or ((b @ p["w"]) ** 2).sum() / 2
    return learned.Probe({"w": w}, loss, layers, optax.sgd(0.1))

  batch, widths = jnp.eye(3), (2, 4)
  found = learned.coord_check(build, widths, batch, steps=2, seeds=2)
  assert traced == [2, 4]
  start = lambda *run: np.asarray(build(*run).params["w"])
  for width, moved in zip(widths, found.moved["y"]):
    runs = [start(width, jax.random.key(seed)) for seed in (0, 1)]
    spread = np.mean([w.std() for w in runs])  # each step takes a tenth of w
    np.testing.assert_allclose(moved, [0.1 * spread, 0.19 * spread], rtol=1e-5)


def cross_entropy(out, batch):
  return meta.cross_entropy(out, batch["y"])


def test_a_flax_models_layers_are_what_its_modules_return(batch):
  model = models.create("mlp", widths=(5, 7), mup=True)
  probe = learned.flax_probe(
    model, KEY, optax.sgd(1.0), batch, inputs="x", loss=cross_entropy
  )
  layers = jax.jit(probe.layers)(probe.params, batch)
  assert layers.keys() == {"dense_0", "dense_1", "output", "whole"}
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  x = np.asarray(batch["x"])
  for name in ("dense_0", "dense_1"):
    p = probe.params[name]
    x = x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])
    close(layers[name], x)
    x = np.maximum(x, 0)
  close(layers["whole"], layers["output"])
  close(layers["whole"], np.tile(probe.params["output"]["bias"] / 7, (64, 1)))
  loss = cross_entropy(layers["whole"], batch)
  close(probe.loss(probe.params, batch), loss)
  direct = models.init(model, KEY, batch["x"]).params
  jax.tree.map(np.testing.assert_array_equal, probe.params, direct)


class Foreign(nn.Module):
  """Statistics, a module that is called twice, two results, no names."""

  @nn.compact
  def __call__(self, x, *, train):
    layer = nn.Dense(64, name="twice")
    x = layer(nn.relu(layer(x)))
    y = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    y = nn.Dropout(0.0, deterministic=True)(y)
    return y[:, :10], x.argmax(-1)


def test_any_flax_model_is_probed(batch):
  loss = lambda out, batch: cross_entropy(out[0], batch)
  options = {"inputs": "x", "loss": loss, "train": True}
  build = lambda width, key: learned.flax_probe(
    Foreign(), key, optax.sgd(0.1), batch, **options
  )
  probe = build(0, KEY)
  layers = jax.jit(probe.layers)(probe.params, batch)
  # Neither dropout nor what is no real number.
  assert layers.keys() == {"twice", "twice 1", "norm", "whole"}
  assert layers["norm"].shape == (64, 64) and layers["whole"].shape == (64, 10)
  np.testing.assert_allclose(layers["norm"].std(0), 1, rtol=1e-2)  # the batch's
  assert "batch_stats" not in probe.params
  learned.coord_check(build, (1, 2), batch, steps=1)


def of_text(batch):
  tokens = jnp.tile(jnp.arange(33), (8, 1)) * jnp.arange(1, 9)[:, None] % 199
  return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def of_images(batch):
  return batch | {
    "x": batch["x"].reshape(64, 8, 8, 1)[:16],
    "y": batch["y"][:16],
  }


def next_token(out, batch):
  z = jax.nn.log_softmax(out)
  return -jnp.take_along_axis(z, batch["y"][..., None], -1).mean()


# Width and muP -> a model; its batch; two widths; rates in muP and without.
OURS = {
  "mlp": (
    lambda w, mup: models.create("mlp", widths=(w,) * 3, mup=mup),
    lambda batch: batch,
    (64, 512),  # at 32 its layers move a third less than at 64 or 1024
    (0.02, 1e-3),
  ),
  "resnet": (
    lambda w, mup: models.ResNet(stages=(1,), width=w / 64, mup=mup),
    of_images,
    (8, 64),
    (0.02, 1e-3),
  ),
  "llama": (
    lambda w, mup: models.create(
      "llama", embed=w, mlp=2 * w, layers=1, scan=False, mup=mup
    ),
    of_text,
    (32, 256),
    (0.05, 3e-3),
  ),
}
FULL = [pytest.param(name, marks=pytest.mark.full) for name in OURS][1:]


@pytest.mark.parametrize("name", ["mlp", *FULL])  # the others compile long
def test_our_models_move_alike_at_all_widths_under_mup_only(name, batch):
  create, of, widths, rates = OURS[name]
  own = of(batch)

  def build(mup):
    def probe(width, key):
      model = create(width, mup)
      names = models.logical_names(model, own["x"])
      info = lambda params: learned.mup_info(params, names=names)
      adam = learned.mup_adamw(rates[0], info), optax.adamw(rates[1])
      options = {"inputs": "x", "loss": next_token, "train": True}
      return learned.flax_probe(model, key, adam[not mup], own, **options)

    return probe

  flat = learned.coord_check(build(True), widths, own, steps=8, seeds=3)
  grown = learned.coord_check(build(False), widths, own, steps=8)
  for layer, ratio in flat.growth().items():
    assert 1 / 1.3 < ratio < 1.3, layer
  assert grown.growth()["whole"] > 3
