"""REPAIR: the average's units vary as the members' do, measured by Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import models, soups, train
from distrain_jax.models import MLP
from distrain_jax.models.norms import BatchNorm, GroupNorm

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(4, 64, 6, 6, 2)).astype(np.float32)
IMAGES += rng.normal(size=(4, 1, 6, 6, 2)).astype(np.float32)  # batches differ


class Net(nn.Module):
  """Convolutions and a hidden layer, with whatever norm is between."""

  norm: str = ""
  bias: bool = True

  @nn.compact
  def __call__(self, x, *, train=False):
    for k in range(2):
      conv = models.layers.Conv(6, 3, ("a", "b"), bias=self.bias, name=f"c{k}")
      x = conv(x)
      if self.norm == "batch":
        x = BatchNorm("b", name=f"n{k}")(x, train)
      elif self.norm == "group":
        x = GroupNorm("b", size=3, name=f"n{k}")(x, train)
      x = nn.relu(x)
    x = nn.relu(nn.Dense(16, name="hidden")(x.mean((1, 2))))
    return nn.Dense(3, name="output")(x)


class Foreign(nn.Module):
  """Flax's layers, recomputed in the backward pass, with a group of inputs."""

  @nn.compact
  def __call__(self, x, *, train=False):
    conv = nn.remat(nn.Conv)(8, (3, 3), feature_group_count=2, name="c0")
    x = nn.relu(conv(x)).mean((1, 2))
    return nn.Dense(3, name="output")(nn.relu(nn.Dense(9, name="hidden")(x)))


NETS = {
  "mlp": (MLP(widths=(16, 12, 8)), ("dense_0", "dense_1", "dense_2")),
  "convolutions": (Net(), ("c0", "c1", "hidden")),
  "group norm": (Net("group"), ("c0", "c1", "hidden")),
  "no bias": (Net(bias=False), ("hidden",)),
  "flax": (Foreign(), ("c0", "hidden")),
}


def members_of(module, count=3):
  """Of different random numbers, biases too; bare params if that is all."""
  shapes = models.zoo.abstract(module, IMAGES[0])

  def one(seed):
    rng = np.random.default_rng(seed)

    def draw(x):
      x = rng.normal(0, x.size and (x.size / x.shape[-1]) ** -0.5, x.shape)
      return jnp.asarray(1.5 * x, jnp.float32)

    found = shapes._replace(params=jax.tree.map(draw, shapes.params))
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    found = found._replace(model_state=jax.tree.map(zeros, shapes.model_state))
    return found if shapes.model_state else found.params

  return [one(seed) for seed in range(count)]


def statistics(module, params, x, layers):
  """Mean and deviation of what Flax captures, in float64."""
  _, seen = module.apply(
    {"params": params}, x, capture_intermediates=True, mutable=["intermediates"]
  )
  found = {}
  for name in layers:
    (y,) = seen["intermediates"][name]["__call__"]
    y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    found[name] = np.stack([y.mean(0), y.std(0)])
  return found


def batches(count=1):
  return [{"image": x} for x in IMAGES[:count]]


@pytest.mark.parametrize("name", NETS)
def test_statistics_are_the_weighted_means_of_the_members(name):
  weights = [0.5, 0.2, 0.3] if name == "mlp" else None
  module, layers = NETS[name]
  members = members_of(module)
  found = soups.repair(module, members, batches(), weights=weights)
  assert found.layers == layers
  own = [statistics(module, m, IMAGES[0], layers) for m in members]
  got = statistics(module, found.model, IMAGES[0], layers)
  plain = soups.weighted(members, weights or [1 / 3] * 3)
  before = statistics(module, plain, IMAGES[0], layers)
  for layer in layers:
    wanted = np.average([x[layer] for x in own], 0, weights)
    np.testing.assert_allclose(got[layer], wanted, atol=1e-4)
    assert np.abs(before[layer] - wanted).max() > 0.01  # were not so


def test_what_is_not_corrected_is_the_average_to_the_bit():
  module, _ = NETS["no bias"]
  members = members_of(module)
  found, plain = (
    soups.repair(module, members, batches()),
    soups.uniform(members),
  )
  assert found.left == {
    "c0": "has no bias to take the shift",
    "c1": "has no bias to take the shift",
    "output": "has the network's outputs",
  }
  for name in found.left:
    jax.tree.map(np.testing.assert_array_equal, found.model[name], plain[name])


def test_several_batches_are_as_one():
  """Although they differ from each other."""
  module, layers = NETS["mlp"]
  members = members_of(module)
  x = np.concatenate(IMAGES)
  own = [statistics(module, m, x, layers) for m in members]
  parts = [{"image": y} for y in np.split(x, [30, 100])]  # nor of one size
  found = soups.repair(module, members, parts).model
  got = statistics(module, found, x, layers)
  for layer in layers:
    wanted = np.mean([m[layer] for m in own], 0)
    np.testing.assert_allclose(got[layer], wanted, atol=1e-3)


def test_equal_members_stay_as_they_are():
  module, _ = NETS["mlp"]
  (member,) = members_of(module, 1)
  found = soups.repair(module, [member] * 3, batches(3)).model
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(near, found, member)


def test_a_channel_that_does_not_vary_is_only_shifted():
  """Two members' kernels cancel: there is nothing to rescale."""
  module = MLP(widths=(4,))
  a, b = members = members_of(module, 2)
  kernel = a["dense_0"]["kernel"][:, 1]
  b["dense_0"]["kernel"] = b["dense_0"]["kernel"].at[:, 1].set(-kernel)
  found = soups.repair(module, members, batches()).model["dense_0"]
  own = [statistics(module, m, IMAGES[0], ["dense_0"]) for m in members]
  means = [x["dense_0"][0, 1] for x in own]
  np.testing.assert_allclose(found["bias"][1], np.mean(means), rtol=1e-4)
  assert not found["kernel"][:, 1].any()


def test_batch_norm_undoes_it_and_only_needs_new_statistics():
  module = Net("batch")
  members = members_of(module)
  method = dj.ddp(lambda *_: (0.0, {}), optax.sgd(0.1))
  run = dj.simulate(method, workers=1)
  mend = lambda m: train.recalibrator(run, module)(m, batches())
  some = lambda name: name in ("c0", "c1")
  repaired = soups.repair(module, members, batches(), layers=some)
  assert repaired.layers == ("c0", "c1")
  assert set(repaired.left) == {"hidden", "output"}
  a, b = mend(repaired.model), mend(soups.uniform(members))
  kernels = [m.params["c0"]["kernel"] for m in (a, b)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01
  out = lambda m: module.apply({"params": m.params, **m.model_state}, IMAGES[0])
  np.testing.assert_allclose(out(a), out(b), rtol=1e-3, atol=1e-3)


class Stacked(nn.Module):
  """Three blocks in one array."""

  @nn.compact
  def __call__(self, x, *, train=False):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.relu(nn.Dense(4, name="up")(x)), None

    x = nn.Dense(4, name="first")(x.mean((1, 2)))
    scan = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return nn.Dense(2, name="output")(scan(name="blocks")(x, None)[0])


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x, *, train=False):
    layer = nn.Dense(2, name="shared")
    return layer(nn.relu(layer(x)))


def test_layers_with_several_statistics_are_refused():
  members = members_of(Stacked(), 2)
  with pytest.raises(ValueError, match="blocks/up is stacked, as by"):
    soups.repair(Stacked(), members, batches())
  with pytest.raises(ValueError, match="shared is called twice"):
    soups.repair(Twice(), members_of(Twice(), 2), batches())


def test_what_cannot_be_is_refused():
  module, members = MLP(widths=()), members_of(MLP(widths=()), 2)
  with pytest.raises(ValueError, match="output has the network's outputs"):
    soups.repair(module, members, batches())
  module, members = NETS["mlp"][0], members_of(NETS["mlp"][0], 2)
  with pytest.raises(ValueError, match="`batches` is empty"):
    soups.repair(module, members, [])
  with pytest.raises(ValueError, match="`models` is empty"):
    soups.repair(module, [], batches())
  with pytest.raises(ValueError, match="must sum to 1"):
    soups.repair(module, members, batches(), weights=[1, 1])


def test_nothing_is_computed_to_find_the_layers():
  module, layers = NETS["mlp"]
  x = jax.ShapeDtypeStruct(IMAGES[0].shape, jnp.float32)
  params = models.zoo.abstract(module, x).params
  assert soups.repairable(module, params, x)[0] == layers


@pytest.mark.parametrize("name", ["vit", "llama", "gpt_neo"])
def test_our_transformers_have_nothing_to_correct(name):
  shape, dtype = ((1, 8, 8, 1), jnp.float32) if name == "vit" else ((1, 8), int)
  x = jax.ShapeDtypeStruct(shape, dtype)
  module = models.create(name, preset="tiny")
  params = models.zoo.abstract(module, x).params
  assert soups.repairable(module, params, x)[0] == ()
