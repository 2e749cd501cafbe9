"""muP: kinds of parameters from names and from widths, and what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned
from distrain_jax.learned.mup import WIDTH
from distrain_jax.models import create, logical_names, zoo
from distrain_jax.models.names import WIDTH as NAMES_THAT_GROW

TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def transformer(**options):
  model = create("llama", preset="tiny", **options)
  return zoo.abstract(model, TOKENS).params, logical_names(model, TOKENS)


def found(info):
  flat = jax.tree_util.tree_leaves_with_path(info)
  return {p[-1].key if hasattr(p[-1], "key") else "": x for p, x in flat}


def test_the_names_that_grow_are_those_of_our_models():
  assert NAMES_THAT_GROW <= WIDTH


def test_kinds_of_a_decoder_by_names():
  params, names = transformer(embed=32, heads=4, kv_heads=2, head_dim=8)
  info = found(learned.mup_info(params, names=names))
  fans = {k: (v.kind, v.fan_in, v.stacked) for k, v in info.items()}
  assert fans["query"] == ("hidden", 32, 1)
  assert fans["key"] == fans["value"] == ("hidden", 32, 1)
  # heads times head size, all that is summed over
  assert fans["out"] == ("hidden", 32, 1)
  assert fans["up"] == fans["gate"] == ("hidden", 32, 1)
  assert fans["down"] == ("hidden", info["up"].fan_out, 1)
  assert info["embedding"].kind == "input"
  assert info["embedding"].multiplier == 1.0
  assert info["out"].multiplier == 1 / 32


def test_the_output_of_attention_is_summed_over_heads_and_their_sizes():
  shape = jax.ShapeDtypeStruct((4, 2, 16, 32), jnp.float32)
  names = ("heads", "queries", "head_dim", "embed")
  info = learned.mup_info({"o": shape}, names={"o": names})["o"]
  assert (info.kind, info.fan_in, info.multiplier) == ("hidden", 128, 1 / 128)
  bias = jax.ShapeDtypeStruct((4, 16), jnp.float32)
  info = learned.mup_info({"b": bias}, names={"b": ("heads", "head_dim")})["b"]
  assert (info.kind, info.fan_out, info.multiplier) == ("input", 64, 1.0)


def mlp(width):
  model = create("mlp", widths=(width, width))
  example = jax.ShapeDtypeStruct((1, 64), jnp.float32)
  return zoo.abstract(model, example).params, logical_names(model, example)


TABLE = {
  "dense_0": ("input", "input"),
  "dense_1": ("hidden", "input"),
  "output": ("output", "fixed"),
}


@pytest.mark.parametrize("how", ["names", "other"])
def test_kinds_of_an_mlp_by_names_and_by_widths(how):
  params, names = mlp(128)
  options = {"names": names} if how == "names" else {"other": mlp(256)[0]}
  info = learned.mup_info(params, **options)
  kinds = {k: (v["kernel"].kind, v["bias"].kind) for k, v in info.items()}
  assert kinds == TABLE
  multipliers = learned.mup_multipliers(params, **options)
  assert multipliers["dense_1"] == {"kernel": 1 / 128, "bias": 1.0}
  assert multipliers["output"] == {"kernel": 1.0, "bias": 1.0}


def test_relative_multipliers_are_one_at_the_base():
  params, names = mlp(128)
  options = {"names": names, "mode": "relative"}
  same = learned.mup_multipliers(params, base=params, **options)
  assert set(jax.tree.leaves(same)) == {1.0}
  narrow = learned.mup_info(params, base=mlp(32)[0], **options)
  assert narrow["dense_1"]["kernel"].multiplier == 32 / 128
  assert narrow["output"]["kernel"].multiplier == 1.0
  assert narrow["output"]["kernel"].sgd_multiplier == 4.0
  assert narrow["dense_0"]["bias"].sgd_multiplier == 4.0


def test_a_convolution_is_summed_over_space_and_channels():
  at = lambda c: {"k": jax.ShapeDtypeStruct((3, 3, c, c), jnp.float32)}
  info = learned.mup_info(at(16), other=at(32))["k"]
  assert (info.kind, info.fan_in, info.guessed) == ("hidden", 144, False)


def test_guesses_are_told_and_can_be_overridden():
  params = mlp(16)[0]
  with pytest.warns(
    UserWarning, match=r"guessed.*6 parameters.*output.*names="
  ):
    info = learned.mup_info(params)
  assert info["dense_0"]["kernel"].kind == "hidden"
  overrides = {"dense_0.*kernel": "input", "output.*kernel": "output"}
  with pytest.warns(UserWarning, match="4 parameters"):
    info = learned.mup_info(params, overrides=overrides)
  assert info["dense_0"]["kernel"].multiplier == 1.0


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"mode": "both"}, "absolute or relative; got 'both'"),
    ({"mode": "relative"}, "Pass base="),
    ({"names": {"dense_0": ()}}, "`names` is no tree like the parameters"),
    ({"overrides": {"x": "big"}}, "one of input, hidden.*'big'"),
    ({"overrides": {"nowhere": "input"}}, "no parameter's path"),
  ],
)
@pytest.mark.filterwarnings("ignore:mup_info")
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    learned.mup_info(mlp(16)[0], **options)


def test_names_of_another_rank_are_refused():
  with pytest.raises(ValueError, match=r"one entry an axis"):
    learned.mup_info({"w": jnp.zeros((2, 3))}, names={"w": ("embed",)})


def test_what_is_held_elsewhere_is_passed_over():
  """As optimizers in groups or shards see it: MaskedNode, None as holes."""
  params, names = mlp(16)
  options = {"names": names, "mode": "relative", "base": mlp(8)[0]}
  whole = learned.mup_info(params, **options, overrides={"output": "fixed"})
  hole = optax.MaskedNode()
  held = {
    "dense_0": {"kernel": hole, "bias": params["dense_0"]["bias"]},
    "dense_1": {"kernel": params["dense_1"]["kernel"], "bias": None},
    "output": hole,
  }
  got = learned.mup_info(held, **options, overrides={"output": "fixed"})
  assert got == {
    "dense_0": {"kernel": hole, "bias": whole["dense_0"]["bias"]},
    "dense_1": {"kernel": whole["dense_1"]["kernel"], "bias": None},
    "output": hole,
  }


def test_mulo_takes_layers_and_multipliers_from_the_info():
  names = {"w": ("layers", "embed", "mlp"), "b": ("layers", "mlp")}
  params = {"w": jnp.ones((3, 4, 6)), "b": jnp.ones((3, 6))}
  info = learned.mup_info(params, names=names)
  theta = learned.init_theta(jax.random.key(0))
  ours = learned.mulo(theta, mup=info)
  later = learned.mulo(theta, mup=lambda p: learned.mup_info(p, names=names))
  said = learned.mulo(theta, mup={"w": 0.25, "b": 1.0}, stacked=1)
  grads = jax.tree.map(
    lambda x: x * jnp.arange(x.size).reshape(x.shape), params
  )
  step = lambda tx: jax.jit(tx.update)(grads, tx.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, step(ours), step(said))
  jax.tree.map(
    np.testing.assert_array_equal, later.init(params), said.init(params)
  )


def test_mup_adamw_and_sgd_scale_steps_by_kind():
  params, names = mlp(8)
  params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
  info = learned.mup_info(params, names=names)
  step = lambda tx: jax.jit(tx.update)(params, tx.init(params), params)[0]
  adam = step(learned.mup_adamw(0.1, info))
  np.testing.assert_allclose(adam["dense_0"]["kernel"], -0.1, rtol=1e-5)
  np.testing.assert_allclose(adam["dense_1"]["kernel"], -0.1 / 8, rtol=1e-5)
  decayed = step(learned.mup_adamw(0.1, info, weight_decay=0.5))
  np.testing.assert_allclose(
    decayed["dense_1"]["kernel"], -0.1 / 8 - 0.05, rtol=1e-5
  )
  late = lambda p: learned.mup_info(p, names=names)
  sgd = step(learned.mup_sgd(0.1, late, momentum=0.9))
  for layer, kernel, bias in (
    ("dense_0", 8, 8),
    ("dense_1", 1, 8),
    ("output", 8, 1),
  ):
    np.testing.assert_allclose(sgd[layer]["kernel"], -0.1 * kernel, rtol=1e-6)
    np.testing.assert_allclose(sgd[layer]["bias"], -0.1 * bias, rtol=1e-6)


def test_sgd_refuses_plain_numbers():
  with pytest.raises(ValueError, match=r"rule='gradient' needs.*mup_info"):
    learned.mup_sgd(0.1, {"w": 0.5}).init({"w": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"unit or gradient; got 'sgd'"):
    learned.scale_by_mup({"w": 0.5}, "sgd")


def test_scale_by_mup_keeps_dtypes_and_works_masked():
  updates = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
  tx = optax.masked(
    learned.scale_by_mup({"w": 0.5, "b": 2.0}), {"w": True, "b": False}
  )
  got, _ = tx.update(updates, tx.init(updates))
  assert got["w"].dtype == jnp.bfloat16 and float(got["w"][0, 0]) == 0.5
  assert float(got["b"][0]) == 1.0
