"""A config's optimizers in muP: what they are told of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import data, learned, models, train
from distrain_jax.train import experiment, mup, optimizers, pipelined

MODEL = {"name": "mlp", "widths": (8, 8), "classes": 3, "mup": True}
LEAVES = {"name": "zero1", "shard": "leaves"}
INPUTS = jax.ShapeDtypeStruct((1, 4), jnp.float32)


@pytest.fixture
def config(tiny):
  """config(name, **changes) of a run with one of the three."""

  def make(name, **changes):
    one = {"optimizer.learning_rate": 1.0} if name == "mulo" else {}
    model = ConfigDict(MODEL)
    usual = {
      "model": model,
      "optimizer.name": name,
      "optimizer.warmup_steps": 0,
    }
    usual["optimizer.schedule"] = "constant"
    return tiny(**usual | one | changes)

  return make


def told(c):
  """(a model's parameters, their names, what muP knows of them)."""
  model = models.create(**c.model.to_dict())
  params = models.init(model, jax.random.key(1), INPUTS).params
  return params, models.logical_names(model, INPUTS), mup.info(c, model, INPUTS)


def stepped(tx, params):
  """Updates of two steps, the second on the first's state."""
  draw = lambda x: jnp.sin(7.0 * jnp.arange(x.size).reshape(x.shape))
  grads, state = jax.tree.map(draw, params), tx.init(params)
  update = jax.jit(tx.update)
  _, state = update(grads, state, params)
  return update(grads, state, params)[0]


def near(a, b):
  one = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)
  jax.tree.map(one, a, b)


def test_mulo_is_the_transform_of_its_name(config):
  c = config("mulo", **{"optimizer.weight_decay": 0.0})
  params, names, info = told(c)
  kinds = {x.kind for x in jax.tree.leaves(info)}
  assert kinds == {"input", "hidden", "output", "fixed"}
  rate = optimizers.schedule(c.optimizer, 10)
  pair = (
    optimizers.build(c.optimizer, 10, names, info),
    learned.mulo(mup=info, learning_rate=rate),
  )
  programs = [
    str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    for tx in pair
  ]
  assert programs[0] == programs[1]
  assert "tanh" in programs[0]  # the features of time


@pytest.mark.parametrize("name", ["mup_adamw", "mup_sgd"])
def test_each_is_the_transform_of_its_name(name, config):
  c = config(name, **{"optimizer.weight_decay": 0.0})
  params, names, info = told(c)
  o = c.optimizer
  wanted = {
    "mup_adamw": lambda: learned.mup_adamw(o.learning_rate, info),
    "mup_sgd": lambda: learned.mup_sgd(o.learning_rate, info, momentum=0.9),
  }[name]()
  got = stepped(optimizers.build(o, 10, names, info), params)
  near(got, stepped(wanted, params))


@pytest.mark.parametrize("name", ["mup_adamw", "mup_sgd"])
def test_weight_decay_is_of_matrices_and_no_multiple_of_muP(name, config):
  c = config(name, **{"optimizer.weight_decay": 0.5})
  c.optimizer.momentum = 0.0
  params, names, info = told(c)
  tx = optimizers.build(c.optimizer, 10, names, info)
  params = jax.tree.map(jnp.ones_like, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  got, _ = tx.update(zeros, tx.init(params), params)
  for x in jax.tree.leaves(got):
    want = -0.5 * c.optimizer.learning_rate if x.ndim > 1 else 0.0
    np.testing.assert_allclose(x, np.full(x.shape, want), rtol=1e-6)


def test_without_muP_multipliers_are_one_but_layers_are_known(config):
  llama = {"name": "llama", "preset": "tiny", "layers": 2, "vocab": 16}
  c = config("mulo", **{"optimizer.mup": False})
  c.model = ConfigDict(llama)
  model, tokens = models.create(**llama), jax.ShapeDtypeStruct((1, 4), "i4")
  found = jax.tree.leaves(mup.info(c, model, tokens))
  assert (
    {x.multiplier for x in found} == {1.0} == {x.sgd_multiplier for x in found}
  )
  assert {x.stacked for x in found} == {0, 1}
  c.optimizer.name = "adamw"
  assert mup.info(c, model, tokens) is None


def test_a_file_decides_theta_and_how_it_was_made(config, tmp_path):
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  made = {"step_mult": "0.5", "exp_mult": "0.001", "update_norm": "rms"}
  made |= {"eps_scaling": "None", "mup": "absolute"}
  learned.save_theta(tmp_path / "theta.safetensors", theta, made)
  c = config("mulo", **{"optimizer.weight_decay": 0.0})
  c.optimizer.theta = str(tmp_path / "theta.safetensors")
  options = mup.options(c.optimizer)
  jax.tree.map(np.testing.assert_array_equal, options.pop("theta"), theta)
  assert options == {
    "step_mult": 0.5,
    "exp_mult": 0.001,
    "update_norm": "rms",
    "implementation": "tiled",
    "tile": None,
  }
  params, names, info = told(c)
  optimizers.build(c.optimizer, 10, names, info).init(params)


@pytest.mark.parametrize(
  ("made", "under"), [("absolute", False), ("none", True)]
)
def test_a_file_of_the_other_parametrisation_is_refused(
  made, under, config, tmp_path
):
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  path = tmp_path / "theta.safetensors"
  c = config("mulo", **{"optimizer.mup": under, "optimizer.theta": str(path)})
  learned.save_theta(path, theta, {"mup": made})
  other = not under
  says = (
    rf"config.optimizer.mup={under}\. Set --config.optimizer.mup={other} and"
  )
  with pytest.raises(ValueError, match=says):
    mup.options(c.optimizer)
  c.optimizer.mup = other
  assert "theta" in mup.options(c.optimizer)
  learned.save_theta(path, theta)  # says nothing: fits both
  c.optimizer.mup = under
  assert "step_mult" not in mup.options(c.optimizer)


@pytest.mark.parametrize(
  "method",
  [{"name": "ddp"}, pytest.param(LEAVES, marks=pytest.mark.full)],
  ids=["ddp", "zero1"],
)
def test_a_run_that_goes_on_ends_with_the_same_bits(method, config, tmp_path):
  few = {"evaluation.every": 0, "checkpoint.every": 0, "steps": 4}
  c = config("mulo", **few, mesh=ConfigDict({"data": 2, "tensor": -1}))
  c.model = ConfigDict(MODEL | {"widths": (4,), "classes": 10})
  c.method.update(method)
  x = train.build(c)
  x = x._replace(evaluate=lambda *_: {"loss": 0.0})  # is not the point
  want = train.train(x, tmp_path / "whole")
  half = c.copy_and_resolve_references()
  half.steps = 2
  train.train(x._replace(config=half), tmp_path / "parts")
  got = train.train(x, tmp_path / "parts")
  assert int(got.state.inner.step) == 4
  equal = lambda a, b: np.testing.assert_array_equal(*map(np.array, (a, b)))
  jax.tree.map(equal, got.state, want.state)
  state = jax.tree.leaves(got.state.inner.opt_state)
  assert max(float(jnp.abs(x).max()) for x in state if x.size) > 0
  if method is LEAVES:
    assert got.state.inner.opt_state["flat"]["float32"].shape[0] == 2


def test_stages_of_one_kind_share_what_their_blocks_are_told(tiny):
  changes = {"name": "mulo", "mup": False, "learning_rate": 1.0}
  c = tiny("stages", **{f"optimizer.{k}": v for k, v in changes.items()})
  info = data.describe(c.data, vocab=None, classes=None).info
  run = experiment.program(c, info, jax.devices()[:4]).run
  assert run.method.name == "petra"
  model = models.create("rev_mlp", width=8, hidden=8, blocks=2, classes=10)
  inputs = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  task = models.task(model, "classification", experiment.example(info))
  cut, _ = pipelined.partition(
    c, model, task, experiment.example(info), {"stage": 4}
  )
  tx = pipelined.transforms(c, model, inputs, cut)
  assert tx["block_0"] is tx["block_1"]
  assert tx["stem"] is not tx["head"]
  params = models.zoo.abstract(model, inputs).params
  for name, one in tx.items():
    state = jax.eval_shape(one.init, params[name])
    assert jax.tree.structure(state[0].count) == jax.tree.structure(0)


def test_layers_may_be_on_different_workers_by_whole_leaves(tiny):
  """An eighth or so of the optimizer each, though layers are stacked."""
  c = tiny(**{"method.name": "zero1", "method.shard": "leaves"})
  c.data.update(name="text", length=8)
  c.model = ConfigDict({"name": "llama", "preset": "tiny", "layers": 8})
  text = data.Info("text", "text", 0, length=8, vocab_size=16)
  run, params = (experiment.program(c, text)[i] for i in (1, 2))
  shapes = jax.eval_shape(params)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  state = run.abstract(jax.eval_shape(lambda: jax.random.key(0)), shapes)
  held = size(state.inner.opt_state) / run.workers
  assert held < 1.1 * 2 * size(shapes) / run.workers


ADAMW = {"optimizer.name": "mup_adamw", "optimizer.learning_rate": 1e-3}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"optimizer.mup": False, "model.mup": False},
    {**ADAMW, "optimizer.learning_rate": 0.03},
    {**ADAMW, "optimizer.mup": False, "model.mup": False},
    {**ADAMW, "optimizer.name": "mup_sgd"},
    {"optimizer.name": "adamw", "model.mup": False},
    {"optimizer.mup": False, "model": ConfigDict({"name": "rev_llama"})},
  ],
)
def test_what_fits_passes(changes, config):
  mup.check(config("mulo", **changes))


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    (ADAMW, "are divided by their fan in. Try --config.optimizer.learning_rat"),
    (
      {"optimizer.name": "adamw"},
      "config.model.mup=True builds 'mlp' in muP, but config.optimizer.name="
      "'adamw' steps as without. Set --config.model.mup=False, or choose mup_ad",
    ),
    (
      {"optimizer.mup": False},
      "name='mulo' with config.optimizer.mup=False steps as without. Set --con",
    ),
    (
      {"model": ConfigDict({"name": "rev_llama"})},
      "'rev_llama' is not built in it: choose another model, or --config.optim",
    ),
    ({"optimizer.learning_rate": 1e-3}, "learning_rate=0.001 multiplies the"),
    ({"optimizer.tile": 0}, "config.optimizer.tile=0 must be at least 1"),
    ({"optimizer.implementation": "cuda"}, "`implementation` is one of tiled"),
    ({"model.mup": False}, "not built in it: set --config.model.mup=True, or"),
    (
      {"model": ConfigDict({"name": "rev_mlp"})},
      "'rev_mlp' is not built in it: choose another model, or --config.optim",
    ),
    (
      {"optimizer.name": "adamw", "optimizer.theta": "x"},
      "config.optimizer.theta='x' are weights of mulo, but config.optimizer.na",
    ),
    ({"optimizer.theta": "/none"}, "config.optimizer.theta='/none': no such"),
  ],
)
def test_what_does_not_fit_is_refused_by_its_field(changes, says, config):
  with pytest.raises((ValueError, FileNotFoundError)) as e:
    train.build(config("mulo", **changes))
  assert says in str(e.value)


def test_a_model_without_names_is_told_what_to_do(config):
  with pytest.raises(ValueError, match=r"name='mup_sgd' needs to know.*other="):
    optimizers.build(config("mup_sgd").optimizer, 10)
