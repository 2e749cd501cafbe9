"""Full-size models, compiled from shapes alone: no array is ever made."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import distrain_jax as dj

METHODS = {"ddp": dj.ddp, "zero1": dj.zero1, "fsdp": dj.fsdp}
VOCAB, LENGTH = 32_000, 1024
# float32, and two moments beside them.
PARAMETERS = {"134M": 134_105_856, "1B": 1_104_218_112}
# layers, channels of the stream and of all query heads
WIDTHS = {"134M": (12, 768), "1B": (16, 2048)}


def report(preset, method, topology, rows):
  model = dj.models.create(
    "llama", preset=preset, vocab=VOCAB, dtype="bfloat16", remat="full"
  )
  row = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  example = {"tokens": row, "targets": row}
  task = dj.models.task(model, "language_model", example)
  run = dj.distribute(
    METHODS[method](task.loss_fn, optax.adamw(1e-3), clip_norm=1.0),
    dj.inspect.mesh(topology, {"data": -1}),
  )
  key = jax.eval_shape(functools.partial(jax.random.key, 0))
  tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
  state = run.abstract(key, jax.eval_shape(task.init, key).params)
  batch = {"tokens": tokens, "targets": tokens}
  return dj.inspect.compile(run, state, batch, key)


def check(found, preset, method):
  n, size = found.devices, 4 * PARAMETERS[preset]
  held = {"ddp": 3 * size, "zero1": size + 2 * size / n, "fsdp": 3 * size / n}
  state = sum(found.memory.state.values())
  assert state == pytest.approx(held[method], rel=2e-3)
  assert not found.step.unknown
  # Forward and backward take 6 operations a parameter and token, and attention
  # 12 a channel, layer and position; remat repeats a block's forward pass, but
  # for what only the next block needs.
  layers, width = WIDTHS[preset]
  head = VOCAB * width
  blocks = PARAMETERS[preset] - 2 * head + 2 * LENGTH * layers * width
  tokens = found.memory.batch / 8
  most = tokens * (8 * blocks + 6 * head)
  assert 0.85 * most < found.flops < 1.01 * most
  assert sum(x.nbytes for x in jax.live_arrays()) < 1e6


@pytest.mark.full
def test_a_model_of_a_billion_parameters():
  check(report("1B", "zero1", "h100:8", 16), "1B", "zero1")


@pytest.mark.full
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:16x16", "h100:8"])
@pytest.mark.parametrize("method", METHODS)
def test_134m_by_all_methods_on_8_and_256_chips(method, topology):
  rows = 512 if topology == "v5e:16x16" else 64
  check(report("134M", method, topology, rows), "134M", method)
