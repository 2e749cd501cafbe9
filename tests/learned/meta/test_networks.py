"""A conv net and a transformer in muP: kinds, scales, and that they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import learned
from distrain_jax.learned import meta

KEY = jax.random.key(0)


def images():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 64).astype(np.int32)
  x = rng.normal(size=(64, 8, 8, 1)) + 2 * (y - 1)[:, None, None, None]
  return {"x": x.astype(np.float32), "y": y}


def text():
  return np.frombuffer(b"to be or not to be, that is the question. " * 20, "u1")


TASKS = {
  "conv": lambda **o: meta.conv_task(images(), 8, batch_size=16, **o),
  "text": lambda **o: meta.text_task(
    text(), 16, length=8, layers=1, batch_size=8, **o
  ),
}


@pytest.mark.parametrize("name", TASKS)
def test_it_learns_under_mup_adam(name):
  task = TASKS[name]()
  run = meta.trained(task, lambda r: learned.mup_adamw(r, task.mup), 60)
  got = run(jnp.asarray(0.05), task.data, KEY)[1]
  assert float(got[-5:].mean()) < 0.8 * float(got[:5].mean())


def test_multipliers_are_those_of_the_names():
  net = meta.Decoder(11, 8, embed=16, layers=1, heads=2)
  params = jax.eval_shape(net.init, KEY)
  assert net.multipliers().keys() == params.keys()
  attention = ("heads", "head_dim")
  names = {
    "embedding": ("vocab", "embed"),
    "position": ("positions", "embed"),
    **dict.fromkeys(["query0", "key0", "value0"], ("embed", *attention)),
    "out0": (*attention, "embed"),
    "up0": ("embed", "mlp"),
    "down0": ("mlp", "embed"),
    "norm0": ("which", "embed"),
    "last_norm": ("embed",),
    "output": ("embed", "vocab"),
  }
  assert learned.mup_multipliers(params, names=names) == net.multipliers()
  net = meta.ConvNet(1, 4, 3)
  params = jax.eval_shape(net.init, KEY)
  wider = jax.eval_shape(meta.ConvNet(1, 8, 3).init, KEY)
  got = learned.mup_multipliers(params, other=wider)
  assert got == net.multipliers() and got["w1"] == 1 / 36


def test_the_past_does_not_see_the_future():
  net = meta.Decoder(11, 8, embed=8, mup=False)
  params, apply = jax.jit(net.init)(KEY), jax.jit(net.apply)
  tokens = jax.random.randint(KEY, (2, 8), 0, 11)
  other = tokens.at[:, 5].set((tokens[:, 5] + 1) % 11)
  a, b = apply(params, tokens), apply(params, other)
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert float(jnp.abs(a[:, 5:] - b[:, 5:]).max()) > 1e-3


def test_attention_logits_of_aligned_vectors_do_not_grow_with_the_head():
  """After training, queries and keys are aligned: their product has n terms."""
  sizes, got = (16, 256), {True: [], False: []}
  for mup in got:
    for size in sizes:
      net = meta.Decoder(11, 8, embed=2 * size, mup=mup)
      q = jnp.ones((1, 2, 2, size))
      got[mup].append(float(net.attention_logits(q, q).max()))
  assert got[True][0] == got[True][1] == 1.0
  assert got[False][1] == 4 * got[False][0]


def test_data_of_the_wrong_kind_are_refused():
  with pytest.raises(ValueError, match=r"images \(n, height.*\(64, 4\)"):
    meta.conv_task({"x": np.ones((64, 4)), "y": np.zeros(64, int)}, 8)
  with pytest.raises(ValueError, match=r"embed a multiple of heads"):
    meta.text_task(text(), 15, heads=2)
  with pytest.raises(ValueError, match=r"more than length \+ 1 tokens"):
    meta.text_task(text()[:8], 16, length=8)
