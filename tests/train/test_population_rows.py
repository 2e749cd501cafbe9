"""Axes of the mesh that divide a member's rows, as a config names them."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import distrain_jax as dj
from distrain_jax import data, inspect, runners, train

MESH = {"fsdp": 2, "population": 2, "tensor": 2}  # sorted, as a config is


@pytest.fixture(scope="module")
def config(small):
  return lambda rows_over, batch_size=16: small(
    **{
      "mesh": ConfigDict(MESH),
      "method.name": "wash",
      "batch_size": batch_size,
      "evaluation.batch_size": 16,
      "population.rows_over": rows_over,
    }
  )


@pytest.mark.parametrize(
  "rows_over",
  [("data",), ("population",), ("fsdp", "fsdp"), ("fsdp", "")],
)
def test_other_axes_are_refused(rows_over, config):
  with pytest.raises(ValueError) as e:
    train.build(config(rows_over), jax.devices()[:8])
  assert f"config.population.rows_over={rows_over!r}" in str(e.value)
  assert str(MESH) in str(e.value)
  assert "a tuple of ('fsdp', 'tensor'), or ()" in str(e.value)


def test_rows_are_cut_into_equal_parts(config):
  train.build(config(("fsdp", "tensor")), jax.devices()[:8])
  with pytest.raises(
    ValueError, match=r"cuts a member's 6 rows .* into 4 .* multiple of 8, or"
  ):
    train.build(config(("fsdp", "tensor"), 12), jax.devices()[:8])


@pytest.mark.parametrize("rows_over", ["fsdp", ("fsdp", "fsdp")])
def test_distribute_takes_each_axis_once(rows_over, mesh):
  method = dj.wash(lambda *_: (0.0, {}), optax.sgd(0.1), axis="data")
  with pytest.raises(ValueError, match="is a tuple of axes, each once, of"):
    runners.distribute(method, mesh(2, fsdp=2), rows_over=rows_over)


@pytest.mark.parametrize(
  "field, value, message",
  [
    (
      "method.learning_rates",
      (1.0,),
      r"has 1 factors, but the population has 2",
    ),
    ("method.leave", (5,), r"numbers go to 2: \[5\] cannot have left"),
    ("population.mixup", ("a",), r"population.mixup=\('a',\) are numbers"),
    ("population.per_device", True, "per_device=True is how many members"),
  ],
)
def test_what_members_cannot_have_is_refused_by_the_config(
  field, value, message, config
):
  c = config(())
  with c.unlocked():
    c.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    train.build(c, jax.devices()[:8])


@pytest.mark.parametrize("method", ["wash", "sparta"])
def test_members_whose_weights_are_divided_exchange_the_same(
  method, small, tmp_path
):
  """And no weight is gathered for it."""
  same = {
    "method.name": method,
    "method.rate": 0.5,
    "method.layer_schedule": "constant",
    "batch_size": 16,
    "steps": 3,
    "evaluation.batch_size": 16,
  }
  plain = small(**same, mesh=ConfigDict({"population": 2}))
  divided = small(
    **same,
    mesh=ConfigDict({"population": 2, "fsdp": 2}),
    sharding=ConfigDict({"hidden_0": "fsdp"}),
    **{"population.rows_over": ("fsdp",)},
  )

  def trained(c, folder, devices):
    built = train.build(c, devices)
    return train.train(built, folder).state.inner.params, built

  wanted, _ = trained(plain, tmp_path / "plain", jax.devices()[:2])
  got, built = trained(divided, tmp_path / "divided", jax.devices()[:4])
  specs = {x.sharding.spec for x in jax.tree.leaves(got)}
  assert any("fsdp" in spec for spec in specs)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  jax.tree.map(near, got, wanted)

  def gathered(c):
    """Bytes of all-gathers in a step, as compiled."""
    program = train.program(c, data.describe("digits").info, jax.devices()[:4])
    report = inspect.compile(program.run, *program.abstract())
    return report.wire_by_kind().get("all-gather", 0)

  alone = divided.copy_and_resolve_references()
  alone.method.update(name="ensemble", rate=None, layer_schedule=None)
  assert gathered(divided) == gathered(alone)
  assert built.run.workers == 2
