"""A function on shards has the values and gradients it has on whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import remat_p

from distrain_jax import pieces
from distrain_jax.gathering import gathered_by_use

pytestmark = pytest.mark.core

N, ROWS, WIDTH = 4, 5, 8
NEAR = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
POLICIES = jax.checkpoint_policies


def make_params():
  rng = np.random.default_rng(0)
  shapes = {
    "layers": {"w": (3, WIDTH, WIDTH), "b": (3, WIDTH)},
    "deep": (2, 3, WIDTH, WIDTH),
    "in": (WIDTH, WIDTH),
    "out": (WIDTH, 16),
    "odd": (3,),
    "scale": (),
  }
  draw = lambda s: jnp.asarray(rng.normal(size=s) / WIDTH**0.5, jnp.float32)
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def make_x():
  return np.random.default_rng(1).normal(size=(N, ROWS, WIDTH)).astype("f4")


def layer(h, one):
  return jnp.tanh(h @ one["w"] + one["b"][None]), h.sum()


def scanned(p, x, body=layer, **options):
  h, sums = lax.scan(body, x, p["layers"], **options)
  return jnp.mean(h @ p["out"]) + jnp.mean(jnp.sin(sums))


def nested(p, x):
  inner = lambda h, ws: lax.scan(lambda h, w: (jnp.sin(h @ w), None), h, ws)
  return jnp.mean(lax.scan(inner, x, p["deep"])[0] ** 2)


def unrolled(p, x):
  for i in range(3):
    x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], p["layers"]))
  return jnp.mean(x**2)


def dots(p, x):
  return scanned(p, x, jax.checkpoint(layer, policy=POLICIES.dots_saveable))


def greedy(p, x):
  policy = POLICIES.everything_saveable
  return scanned(p, x, jax.checkpoint(layer, policy=policy))


def jitted(p, x):
  f = jax.jit(lambda w, x: jax.nn.silu(x @ jax.nn.silu(w)))
  return jnp.mean(f(p["in"].T, x) ** 2)


@jax.custom_vjp
def product(x, w):
  return x @ w


product.defvjp(
  lambda x, w: (x @ w, (x, w)), lambda xw, ct: (ct @ xw[1].T, xw[0].T @ ct)
)


def custom(p, x):
  return jnp.mean(product(x, p["in"]) ** 2) + jnp.mean(
    x @ jax.nn.relu(p["out"])
  )


def tied(p, x):
  h = jnp.take(p["in"], jnp.arange(ROWS), axis=0) + x
  return jnp.mean(jnp.sin(h) @ p["in"].T)


def converted(p, x):
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
  head = (x.astype(jnp.bfloat16) @ low["in"].T).astype(jnp.float32)
  wide = low["deep"][1, 2].astype(jnp.float32)
  return scanned(low, x.astype(jnp.bfloat16)) + jnp.mean(head @ wide)


def moved(p, x):
  w, out = p["layers"]["w"], p["out"]
  first, second = jnp.split(out, 2, axis=1)
  both = jnp.concatenate([first, second.T], axis=0)
  turned = jnp.flip(w[1:].reshape(2, 1, WIDTH, WIDTH), axis=(1, 2))[1, 0]
  i = jnp.argmax(x[0, :3])  # differs by worker
  y = x @ turned + x @ both[2:10] + x @ w[i] + x @ jnp.pad(first, 1)[1:-1, 1:-1]
  return jnp.mean(jnp.sin(y + x @ out.reshape(WIDTH, 2, WIDTH)[:, 1]))


def scaled(p, x):
  w = p["in"] * 2.0 - jnp.exp(p["in"]) + lax.stop_gradient(p["in"])
  w = p["scale"] * w * x.mean()  # the latter differs by worker
  return jnp.mean(x @ w) + jnp.mean(jnp.sin(x @ (p["in"] + p["deep"][0, 1])))


def standardised(p, x):
  w = p["in"].astype(jnp.bfloat16).astype(jnp.float32)
  w = (w - w.mean(0, keepdims=True)) / jnp.sqrt(jnp.sum(w**2, 0) + 1.0)[None]
  return jnp.mean((x @ w) ** 2)


def decayed(p, x):
  squares = sum(jnp.sum(a**2) for a in jax.tree.leaves(p))
  return jnp.mean(x @ p["in"]) + 0.1 * squares + p["odd"].sum()


def mapped(p, x):
  return jax.vmap(lambda row: jnp.sin(row @ p["in"]).sum())(x).mean()


def whole_scan_again(p, x):
  return jax.checkpoint(scanned)(p, x)


# What they hold for the backward pass has no whole parameter in it.
LEAN = {
  "scan": scanned,
  "scan, reversed and unrolled": lambda p, x: scanned(
    p, x, reverse=True, unroll=2
  ),
  "scan in scan": nested,
  "layers unrolled": unrolled,
  "checkpoint in scan": lambda p, x: scanned(p, x, jax.checkpoint(layer)),
  "checkpoint that saves products": dots,
  "checkpoint that saves all": greedy,
  "scan in checkpoint": whole_scan_again,
  "jit": jitted,
  "custom gradients": custom,
  "tied": tied,
  "narrower": converted,
  "moves": moved,
  "arithmetic": scaled,
  "standardised": standardised,
  "decay": decayed,
  "vmap": mapped,
}


def in_branch(p, x):
  return lax.cond(x.sum() > 0, lambda w: (x @ w).sum(), jnp.sum, p["in"])


def in_loop(p, x):
  h = lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ p["in"]), x)
  return jnp.mean(h) + jnp.mean(x[0, 0] * p["in"])


def meta(p, x):
  loss = jax.checkpoint(lambda w: jnp.mean(jnp.sin(x @ w)))
  w = p["in"] - 0.1 * jax.grad(loss)(p["in"])
  return loss(w)


def passed_out(p, x):
  w, b = jax.checkpoint(lambda q, x: (q["in"].T, x))(p, x)
  _, ws = lax.scan(lambda c, w: (c, w), 0.0, p["layers"]["w"])
  return jnp.mean(b @ w) + jnp.mean(jnp.sin(b @ ws[1]))


def literals_in_checkpoint(p, x):
  def clamped(w, x):
    return jnp.mean(x @ lax.clamp(-0.5, w, 0.5))

  def chosen(w, x):
    product = lambda w, scale: (scale * x @ w).sum()
    return lax.cond(x.sum() > 0, product, lambda w, _: w.sum(), w, 2.0)

  checkpointed = [jax.checkpoint(f)(p["in"], x) for f in (clamped, chosen)]
  return sum(checkpointed)


CASES = LEAN | {
  "cond": in_branch,
  "loop": in_loop,
  "gradient inside": meta,
  "literals in checkpoint": literals_in_checkpoint,
  "nothing but passed on": passed_out,
}


def on_shards(fn):
  """One worker's (value, gradient of its pieces), from the whole params."""

  def one(params, x):
    mine = pieces.cut(params, N, lax.axis_index("data"))
    by_use = gathered_by_use(fn)
    loss = lambda mine, x: by_use(pieces.shards(mine, "data"), x)
    return jax.value_and_grad(loss)(mine, x)

  return one


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_whole_parameters(name):
  fn, params, x = CASES[name], make_params(), make_x()
  # Not jitted: XLA may leave out roundings to bfloat16, and not in both.
  both = jax.vmap(jax.value_and_grad(fn), in_axes=(None, 0))
  expected, grads = both(params, x)
  run = jax.vmap(on_shards(fn), in_axes=(None, 0), axis_name="data")
  values, cut = run(params, x)
  NEAR(values, expected)
  whole = jax.tree.map(lambda g: g.sum(0), cut.whole)  # the method's to sum
  got = pieces.unstack(cut._replace(whole=whole))
  jax.tree.map(lambda a, b: NEAR(a, b.sum(0)), got, grads)


def kept(fn):
  """Shapes of what one worker's backward pass is given by its forward pass."""

  def one(params, x):
    mine = pieces.cut(params, N, lax.axis_index("data"))
    loss = lambda mine: fn(pieces.shards(mine, "data"), x)
    return jax.tree.leaves(jax.vjp(loss, mine)[1])

  run = jax.vmap(one, in_axes=(None, 0), axis_name="data")
  return [x.shape[1:] for x in jax.eval_shape(run, make_params(), make_x())]


def is_whole(shape):
  """Activations have ROWS in their shape; pieces lack a factor of N."""
  return ROWS not in shape and shape[-2:] in SQUARES


SQUARES = [(WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)]


@pytest.mark.parametrize("name", LEAN)
def test_no_whole_parameter_waits_for_the_backward_pass(name):
  assert not list(filter(is_whole, kept(gathered_by_use(LEAN[name]))))


def test_a_plainly_gathered_parameter_would():
  def plain(p, x):
    return scanned(
      jax.tree.map(lambda s: getattr(s, "gathered", lambda: s)(), p), x
    )

  assert list(filter(is_whole, kept(plain)))


def test_a_sum_over_all_parameters_gathers_them_one_by_one():
  params = make_params()
  mine = jax.eval_shape(lambda: pieces.cut(params, N, 0))
  loss = lambda mine, x: gathered_by_use(decayed)(
    pieces.shards(mine, "data"), x
  )
  trace = jax.make_jaxpr(loss, axis_env=[("data", N)])
  uses = [
    str(eqn).count("all_gather[")
    for eqn in trace(mine, make_x()[0]).eqns
    if eqn.primitive is remat_p
  ]
  leaves = jax.tree.leaves(params)
  cut = [x for x in leaves if pieces.dimension(x, N) is not None]
  assert sum(uses) == len(cut) + 1  # one of them is used twice
  assert max(uses) == 1
