"""Memory by stage: the paper's figures, and the state that a run really has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import petra_networks as nets
import pytest

import distrain_jax as dj
from distrain_jax import models
from distrain_jax.inspect import stage_memory as memory
from distrain_jax.models import parts, tasks

KEY = jax.random.key(0)
SGD = optax.sgd(0.1, momentum=0.9)


def of_revnet(name, stem, classes, size):
  model = models.create(name, stem=stem, classes=classes)
  example = {
    "image": jax.ShapeDtypeStruct((64, size, size, 3), jnp.float32),
    "label": jax.ShapeDtypeStruct((64,), jnp.int32),
  }
  return memory.stage_memory(
    parts.blocks(model, tasks.classification_measure()),
    shapes=models.abstract(model, example["image"]),
    example=example,
    inputs="image",
  )


@pytest.fixture(scope="module")
def revnet50():
  return of_revnet("revnet50", "imagenet", 1000, 224)


def test_the_papers_table_of_revnet50_on_imagenet(revnet50):
  totals = [round(revnet50.total(row) / 1e9, 2) for row in memory.ROWS]
  assert totals == [44.45, 43.58, 21.20, 20.33]
  saved = [round(100 * revnet50.saving(row), 1) for row in memory.ROWS]
  assert saved == [0, 2.0, 52.3, 54.3]
  assert round(100 * revnet50.saving(first=False), 1) == 52.9


def test_it_is_model_and_input_and_what_is_kept(revnet50):
  """The decomposition of those figures, GB."""
  sums = [sum(x) / 1e9 for x in zip(*revnet50.formula)]
  model, one, plain, reversible, params = sums
  stem = revnet50.formula[0].plain / 1e9
  assert round(model + one, 2) == 2.04
  assert round(plain + reversible, 2) == 41.54
  assert round(plain - stem, 2) == 18.29
  assert round(params, 2) == 0.88
  # 90 % of what remains is kept by four stages, 11.1 GB held by one of them.
  kept = [f.plain for f in revnet50.formula[1:] if f.plain]
  assert len(kept) == 4
  assert round(sum(kept) / revnet50.total("none"), 2) == 0.90
  fullest = revnet50.formula[4]
  assert round((sum(fullest[:2]) + fullest.plain) / 1e9, 1) == 11.1


@pytest.mark.parametrize(
  "stem, classes, size, most, least",
  [("imagenet", 1000, 224, 4.94, 2.17), ("cifar", 10, 32, 1.54, 0.73)],
)
def test_the_same_of_revnet18(stem, classes, size, most, least):
  found = of_revnet("revnet18", stem, classes, size)
  totals = [found.total(row) / 1e9 for row in ("input_params", "none")]
  assert [round(x, 2) for x in totals] == [most, least]


def test_it_prints_the_savings_counted_alike(revnet50):
  text = str(revnet50)
  for found in ("44.45", "43.58", "21.20", "20.33", "54.3 %", "52.9 %"):
    assert found in text
  assert "51.3 % with them in all" in text


def a_network():
  blocks, params, state = nets.make("rnr", stats=True)
  x, y = nets.batches(1)
  network = [blocks[:2], *blocks[2:]]  # a stage of two blocks
  return network, dj.Variables(params, state), (x, y)


@pytest.mark.parametrize("buffer", memory.ROWS)
@pytest.mark.parametrize("k", [1, 2])
def test_used_and_padding_are_the_state_that_petra_has(buffer, k):
  network, model, example = a_network()
  options = {"shapes": model, "example": example, "accumulate": k}
  found = memory.stage_memory(network, tx=SGD, **options)
  method = dj.petra(network, SGD, buffer=buffer, **options)
  run = dj.simulate(method, workers=len(network))
  state = run.abstract(KEY, model)
  fields = {
    "params": state.params,
    "model_state": state.model_state,
    "opt_state": state.opt_state,
    "messages": (state.flight.up, state.flight.down),
    "fifo": state.flight.fifo,
  }
  fields |= {"grads": state.grads} if k > 1 else {}
  for used, padding in found.buffers[buffer]:
    assert used.keys() == padding.keys() == fields.keys()
    for name, tree in fields.items():
      held = sum(
        x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
      )
      assert used[name] + padding[name] == held // len(network)
      assert used[name] >= 0 and padding[name] >= 0


def test_used_is_what_a_stage_has_of_its_own():
  network, model, example = a_network()
  found = memory.stage_memory(
    network, tx=SGD, shapes=model, example=example, accumulate=3
  )
  x, streams, narrow = nets.ROWS * 5, nets.ROWS * 12, nets.ROWS * 10
  first, second, third, last = (b.used for b in found.buffers["none"])
  block = 2 * 6 * 7 + 7
  own = [5 * 12 + block, 2 * 6 * 5, 2 * 5 * 7 + 7, 10 * 3]
  # The third is as wide as the network makes it: F reads 5, has 7 units.
  for used, count in zip((first, second, third, last), own):
    assert used["params"] == used["grads"] == used["opt_state"] == 4 * count
  assert first["model_state"] == third["model_state"] == 4 * 7
  # tau = 6, 4, 2, 0; the first keeps what its stem reads, not what its
  # reversible block does.
  assert first["fifo"] == 6 * 4 * x
  assert second["fifo"] == 4 * 4 * streams
  assert third["fifo"] == last["fifo"] == 0
  # Streams and targets up, streams and their gradients down.
  targets = 4 * nets.ROWS
  assert first["messages"] == 0
  assert second["messages"] == 3 * 4 * streams + targets
  assert third["messages"] == last["messages"] == 3 * 4 * narrow + targets


@pytest.mark.parametrize("k, copies", [(1, [6, 4, 2, 0]), (4, [2, 1, 1, 0])])
def test_parameters_are_kept_once_an_update_in_flight(k, copies):
  network, model, example = a_network()
  found = memory.stage_memory(
    network, shapes=model, example=example, accumulate=k
  )
  own = [b.used["params"] for b in found.buffers["none"]]
  assert [f.params for f in found.formula] == [
    count * size for count, size in zip(copies, own)
  ]
