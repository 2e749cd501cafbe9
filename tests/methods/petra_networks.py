"""Small networks in stages, and the slow oracle that keeps everything.

The oracle is written from the paper's update rule for one batch at a time, and
shares no code with the package but the blocks' own functions: it holds every
version of every parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax import stages

ROWS, WIDTH, CLASSES = 4, 6, 3


def branch(params, model_state, x, key):
  """F of the couplings: a hidden layer, statistics if it has any."""
  h = jnp.tanh(x @ params["a"] + params["b"][None])
  if model_state:
    old = model_state["batch_stats"]["mean"]
    model_state = {"batch_stats": {"mean": 0.9 * old + 0.1 * h.mean(0)}}
  return h @ params["c"], model_state


def dropping(params, model_state, x, key):
  y, model_state = branch(params, model_state, x, key)
  kept = jax.random.bernoulli(key, 0.7, y.shape)
  return jnp.where(kept, y, 0), model_state


def stem(params, model_state, x, key):
  h = jnp.tanh(x @ params["w"])
  return (h[:, :WIDTH], h[:, WIDTH:]), model_state


def narrow(params, model_state, streams, key):
  """Not reversible, and changes the width."""
  x, r = streams
  return (
    jnp.tanh(x @ params["u"] + r @ params["v"]),
    jnp.tanh(x @ params["v"]),
  ), model_state


def head(params, model_state, streams, targets, key):
  logits = jnp.concatenate(streams, -1) @ params["w"]
  logs = jax.nn.log_softmax(logits)
  loss = -jnp.take_along_axis(logs, targets[:, None], 1).mean()
  hits = (logits.argmax(-1) == targets).mean(dtype=jnp.float32)
  return loss, ({"accuracy": hits}, model_state)


def normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def make(kinds, *, stats=False, fn=branch, seed=0):
  """(blocks, Variables or params) of a network.

  Args:
    kinds: a letter a block between stem and head: r reversible, n narrows.
    stats: whether the reversible blocks have running statistics.
  """
  rng, width = np.random.default_rng(seed), WIDTH
  blocks = [stages.plain("stem", stem)]
  params = {"stem": {"w": normal(rng, 5, 2 * WIDTH)}}
  state = {}
  for i, kind in enumerate(kinds):
    name = f"block_{i}"
    if kind == "r":
      blocks.append(stages.coupling(name, fn, kind=fn.__name__))
      params[name] = {
        "a": normal(rng, width, 7),
        "b": normal(rng, 7),
        "c": normal(rng, 7, width),
      }
      if stats:
        state[name] = {"mean": jnp.zeros(7)}
    else:
      blocks.append(stages.plain(name, narrow))
      new = width - 1
      params[name] = {
        "u": normal(rng, width, new),
        "v": normal(rng, width, new),
      }
      width = new
  blocks.append(stages.last("head", head))
  params["head"] = {"w": normal(rng, 2 * width, CLASSES)}
  return blocks, params, {"batch_stats": state} if stats else {}


def batches(count, rows=ROWS, seed=1):
  """(inputs (count * rows, 5), targets)."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count * rows, 5)).astype(np.float32)
  return x, rng.integers(0, CLASSES, count * rows).astype(np.int32)


class Oracle:
  """Replays eq. 5 batch by batch, from a full history of the parameters.

  Stage j's parameters after u updates are history[j][u]. The forward pass of
  batch b on stage j happens at tick b + j, the backward pass at tick
  b + 2 (J - 1) - j, each with the newest parameters of that tick; the update
  after every k-th own gradient ends the tick.
  """

  def __init__(
    self,
    blocks,
    params,
    state,
    tx,
    *,
    k=1,
    mode="none",
    key=None,
    frozen=(),
    predict=0.0,
  ):
    self.blocks, self.tx, self.k, self.mode = blocks, tx, k, mode
    self.frozen, self.predict = frozen, predict
    self.J = len(blocks)
    self.key = jax.random.key(0) if key is None else key
    self.history = [[params.get(b.name, {})] for b in blocks]
    self.opt = [tx.init(h[0]) for h in self.history]
    self.state = [
      {c: v[b.name] for c, v in state.items() if b.name in v} for b in blocks
    ]
    self.sums = [None] * self.J
    self.grads = [[] for _ in blocks]  # every gradient, by stage
    self.losses = []
    self.reconstructed = [[] for _ in blocks]

  def updates(self, j, tick):
    """How many updates of stage j were made before a tick."""
    # Gradient g is there at tick g + 2 (J - 1) - j, update u after k of them.
    return max(0, tick - (2 * (self.J - 1) - j)) // self.k

  def at(self, j, tick):
    """Stage j's parameters at a tick: the updates of earlier ticks are in."""
    return self.history[j][self.updates(j, tick)]

  def forward_at(self, j, b):
    """Those of batch b's forward pass: moved on as the last update did."""
    now, then = (
      self.updates(j, b + j),
      self.updates(j, b + 2 * (self.J - 1) - j),
    )
    params = self.history[j][now]
    if not self.predict or not now:
      return params
    factor = self.predict * (then - now)
    before = self.history[j][now - 1]
    return jax.tree.map(lambda p, q: p + factor * (p - q), params, before)

  def keys(self, b):
    key = jax.random.fold_in(self.key, b)
    return [jax.random.fold_in(key, j) for j in range(self.J)]

  def run(self, xs, ys):
    for b in range(len(xs)):
      self.one(b, xs[b], ys[b])

  def one(self, b, x, y):
    J, keys, inputs, forward_params = self.J, self.keys(b), [], []
    for j in range(J - 1):
      params = self.forward_at(j, b)
      inputs.append(x)
      forward_params.append(params)
      x, _ = self.blocks[j].forward(params, self.state[j], x, keys[j])
    j = J - 1
    params = self.at(j, b + j)
    fn = lambda p, x: self.blocks[j].loss(p, self.state[j], x, y, keys[j])
    (loss, (_, state)), (grads, dx) = jax.value_and_grad(
      fn, argnums=(0, 1), has_aux=True
    )(params, x)
    self.losses.append(float(loss))
    self.state[j] = state
    self.learn(j, grads)
    for j in range(J - 2, -1, -1):
      now, old = self.at(j, b + 2 * (J - 1) - j), forward_params[j]
      block = self.blocks[j]
      true_input = self.mode in ("input", "input_params", "graph")
      if block.inverse is None or true_input:
        x = inputs[j]
      else:
        x = block.inverse(
          old if self.mode == "params" else now, self.state[j], x, keys[j]
        )
      self.reconstructed[j].append((x, inputs[j]))
      old_gradient = self.mode in (
        "input_params",
        "params",
        "params_gradient",
        "graph",
      )
      params = old if old_gradient else now
      grads, dx, state = self.gradient(j, params, x, dx, keys[j])
      self.state[j] = state
      self.learn(j, grads)

  def gradient(self, j, params, x, dy, key):
    """(of the parameters, of x; the first stage's may be whole numbers)."""
    fn = lambda p, x: self.blocks[j].forward(p, self.state[j], x, key)
    if j == 0:
      _, pull, state = jax.vjp(lambda p: fn(p, x), params, has_aux=True)
      return *pull(dy), None, state
    _, pull, state = jax.vjp(fn, params, x, has_aux=True)
    return *pull(dy), state

  def learn(self, j, grads):
    self.grads[j].append(grads)
    if len(self.grads[j]) % self.k:
      return
    last = self.grads[j][-self.k :]
    mean = jax.tree.map(lambda *g: sum(g) / self.k, *last)
    updates, self.opt[j] = self.tx.update(
      mean, self.opt[j], self.history[j][-1]
    )
    if self.blocks[j].name in self.frozen:
      updates = jax.tree.map(jnp.zeros_like, updates)
    new = jax.tree.map(jnp.add, self.history[j][-1], updates)
    self.history[j].append(new)

  def params(self):
    return {b.name: h[-1] for b, h in zip(self.blocks, self.history)}

  def model_state(self):
    found = {}
    for block, state in zip(self.blocks, self.state):
      for collection, tree in state.items():
        found.setdefault(collection, {})[block.name] = tree
    return found
