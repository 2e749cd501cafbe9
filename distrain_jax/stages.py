"""Networks cut into stages, for methods that put them on different devices.

A network is a sequence of blocks, each a pure function of its own parameters;
a stage of a pipeline holds one block or several neighbours. The last block ends
in the loss.

A reversible block can compute its input from its output. The additive coupling
makes one of any function F of one of two streams (Gomez et al., "The Reversible
Residual Network", 2017, https://arxiv.org/abs/1707.04585), here in the form of
PETRA (Rivaud et al., 2024, https://arxiv.org/abs/2406.02052), with one F and
streams that change places: (x, r) -> (r + F(x), x).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.method import Batch, Variables

Streams = Any  # a pytree of floating arrays with leading rows


class Reversed(NamedTuple):
  """What a reversible block makes of its output and that one's gradient."""

  x: Streams  # its input, reconstructed
  dx: Streams
  grads: Any  # of its parameters
  model_state: Any


class Block(NamedTuple):
  """A part of a network, without its parameters.

  `plain`, `coupling`, `reversible` and `last` make them.
  """

  name: str  # of its parameters in the network's
  # (params, model_state, x, key) -> (y, model_state); None for the last one.
  forward: Callable[..., tuple[Streams, Any]] | None
  # (params, model_state, y, key) -> x; None: not reversible.
  inverse: Callable[..., Streams] | None = None
  # (params, model_state, y, dy, key) -> Reversed, in one pass through F where
  # that can be.
  reverse: Callable[..., Reversed] | None = None
  # The last: (params, model_state, x, targets, key) -> (loss, (aux, state)).
  loss: Callable[..., Any] | None = None
  # Blocks of one kind (not None) and equal shapes run the same code.
  kind: Hashable = None


def plain(name: str, fn: Callable[..., Any], *, kind: Hashable = None) -> Block:
  """A block that is not reversible.

  Args:
    name: key of its parameters in the network's.
    fn: `(params, model_state, x, key) -> (y, model_state)`. The first block's x
      is the batch's inputs; y is a tree of floating arrays with leading rows.
      model_state is {} for a block without any.
    kind: equal for blocks that run the same code on their own parameters.
  """
  return Block(name, fn, kind=kind)


def coupling(
  name: str,
  fn: Callable[..., Any],
  *,
  grid: float | None = None,
  kind: Hashable = None,
) -> Block:
  """The reversible (x, r) -> (r + F(x), x), of any F.

  Going back costs one pass forward and one backward through F: the same
  evaluation tells what to subtract and has the gradient taken of it.

  Args:
    name: key of F's parameters in the network's.
    fn: F as `(params, model_state, x, key) -> (F(x), model_state)`; F(x) has
      r's shape and dtype.
    grid: F(x) is rounded to multiples of it, a power of two, as if that had
      derivative 1. Streams that start on the grid then stay there, and are
      reconstructed exactly while float32 holds them: below 2^24 grid.
    kind: as for `plain`.

  Raises:
    ValueError: if grid is not a power of two.
  """
  if grid is not None and not (grid > 0 and np.frexp(grid)[0] == 0.5):
    raise ValueError(
      f"stages.coupling {name!r}: `grid` is a power of two such as 2**-12, or "
      f"None; got {grid!r}."
    )

  def branch(params, model_state, x, key):
    y, model_state = fn(params, model_state, x, key)
    return (y if grid is None else on_grid(y, grid)), model_state

  def forward(params, model_state, streams, key):
    x, r = streams
    y, model_state = branch(params, model_state, x, key)
    return (r + y, x), model_state

  def inverse(params, model_state, streams, key):
    y, x = streams
    return x, y - branch(params, model_state, x, key)[0]

  def reverse(params, model_state, streams, gradients, key):
    (y, x), (dy, dx) = streams, gradients
    of = lambda params, x: branch(params, model_state, x, key)
    fx, pull, model_state = jax.vjp(of, params, x, has_aux=True)
    grads, through = pull(dy)
    return Reversed((x, y - fx), (dx + through, dy), grads, model_state)

  kind = None if kind is None else ("coupling", grid, kind)
  return Block(name, forward, inverse, reverse, kind=kind)


def reversible(
  name: str,
  fn: Callable[..., Any],
  inverse: Callable[..., Any],
  *,
  kind: Hashable = None,
) -> Block:
  """A reversible block with an inverse of its own.

  Going back costs the inverse, and a pass forward and one backward.

  Args:
    name, fn, kind: as for `plain`.
    inverse: `(params, model_state, y, key) -> x`. `check_inverses` tries it.
  """

  def reverse(params, model_state, y, dy, key):
    x = inverse(params, model_state, y, key)
    of = lambda params, x: fn(params, model_state, x, key)
    _, pull, model_state = jax.vjp(of, params, x, has_aux=True)
    grads, dx = pull(dy)
    return Reversed(x, dx, grads, model_state)

  return Block(name, fn, inverse, reverse, kind=kind)


def last(name: str, loss: Callable[..., Any]) -> Block:
  """The block that ends in the loss.

  Args:
    name: key of its parameters in the network's.
    loss: `(params, model_state, x, targets, key) -> (loss, (aux, model_state))`:
      a scalar and a dict of scalars, means over the rows.
  """
  return Block(name, None, loss=loss)


@jax.custom_jvp
def _round(x):
  return jnp.round(x)


_round.defjvp(lambda primals, tangents: (_round(*primals), tangents[0]))


def on_grid(x: jax.Array, grid: float) -> jax.Array:
  """x rounded to multiples of grid, with the derivative of the identity."""
  return _round(x / grid) * grid


def check_blocks(blocks: Sequence[Block]) -> tuple[Block, ...]:
  """The blocks of a network, checked.

  Raises:
    ValueError: if names repeat, or not exactly the last block has a loss.
  """
  blocks = tuple(blocks)
  names = [b.name for b in blocks]
  again = sorted({n for n in names if names.count(n) > 1})
  if again:
    raise ValueError(
      f"stages: two blocks are called {', '.join(map(repr, again))}. Names are "
      "keys of the network's parameters: give each its own."
    )
  with_loss = [b.name for b in blocks if b.loss is not None]
  if not blocks or with_loss != names[-1:]:
    raise ValueError(
      f"stages: the blocks {names} must end in the one that has the loss "
      f"(stages.last), and only that one; with a loss: {with_loss}."
    )
  return blocks


def inputs_and_targets(batch: Batch, inputs: str | None) -> tuple[Any, Any]:
  """(what the first block gets, what the loss gets) of a batch.

  Args:
    batch: a pair of the two, or a mapping.
    inputs: None for a pair; else the key of the inputs: all others are targets.

  Raises:
    TypeError: if the batch is of another form.
  """
  if inputs is None:
    if isinstance(batch, Sequence) and len(batch) == 2:
      return batch[0], batch[1]
    raise TypeError(
      "stages: without `inputs`, a batch is a pair (inputs, targets); got "
      f"{type(batch).__name__}. Pass inputs=KEY for a mapping."
    )
  if isinstance(batch, Mapping) and inputs in batch:
    return batch[inputs], {k: v for k, v in batch.items() if k != inputs}
  keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
  raise TypeError(
    f"stages: inputs={inputs!r} is a key of the batch; got {keys}."
  )


def of_block(name: str, params: Any, model_state: Any) -> tuple[Any, Any]:
  """A block's own of a network's params and model_state.

  Args:
    name: the block's.
    params: {block: tree}; a block without parameters need not be there.
    model_state: {collection: {block: tree}}, as Flax has it, or ().
  """
  mine = {c: v[name] for c, v in dict(model_state).items() if name in v}
  return params.get(name, {}), mine


def joined(states: Mapping[str, Any]) -> dict[str, Any]:
  """{block: {collection: tree}} -> {collection: {block: tree}}."""
  out: dict[str, Any] = {}
  for name, collections in states.items():
    for c, tree in collections.items():
      out.setdefault(c, {})[name] = tree
  return out


def abstract_streams(
  blocks: Sequence[Block], model: Any, inputs: Any, targets: Any
) -> list[Any]:
  """What goes into each block, as `jax.ShapeDtypeStruct`s.

  Args:
    blocks: of the whole network.
    model: its params, or `Variables`, as arrays or shapes.
    inputs, targets: a batch's, as arrays or shapes.

  Returns:
    One tree a block: the first's is `inputs`.

  Raises:
    ValueError: where a block cannot take what the one before returns, or
      returns what cannot travel; both are named, with shapes.
  """
  params, model_state = parts(model)
  key = jax.eval_shape(lambda: jax.random.key(0))
  shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
  x = jax.tree.map(shape, inputs)
  found, before = [], "the batch"
  for block in blocks:
    found.append(x)
    own = of_block(block.name, params, model_state)
    try:
      if block.loss is not None:
        jax.eval_shape(block.loss, *own, x, targets, key)
        break
      y, _ = jax.eval_shape(block.forward, *own, x, key)
    except (TypeError, ValueError) as e:
      raise ValueError(
        f"stages: block {block.name!r} cannot take what {before} gives it, "
        f"{described(x)}: {e}"
      ) from e
    for leaf in jax.tree.leaves(y):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f"stages: block {block.name!r} returns {described(y)}; what passes "
          "between blocks must be floating, since gradients come back."
        )
    if block.inverse is not None:
      _check_same(block, x, jax.eval_shape(block.inverse, *own, y, key))
    x, before = y, f"block {block.name!r}"
  return found


def _check_same(block, x, back):
  if described(x) != described(back):
    raise ValueError(
      f"stages: block {block.name!r} is declared reversible, but its inverse "
      f"returns {described(back)} for an input of {described(x)}."
    )


def check_inverses(
  blocks: Sequence[Block],
  model: Any,
  inputs: Any,
  *,
  tolerance: float = 1e-2,
) -> dict[str, float]:
  """Runs small random input forward and back through the reversible blocks.

  Args:
    blocks: of the whole network.
    model: its params, or `Variables`.
    inputs: a batch's, as arrays or shapes; two rows are used.
    tolerance: largest relative error that passes.

  Returns:
    {name of a reversible block: relative error, |x' - x| / |x|}.

  Raises:
    ValueError: for a block whose inverse is not one.
  """
  params, model_state = parts(model)
  rng, key = np.random.default_rng(0), jax.random.key(0)

  def two_rows(x):
    shape = (min(2, x.shape[0]), *x.shape[1:])
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(rng.normal(size=shape), x.dtype)
    return jnp.asarray(rng.integers(0, 2, shape), x.dtype)

  x, errors = jax.tree.map(two_rows, inputs), {}
  for block in blocks:
    if block.forward is None:
      break
    own = of_block(block.name, params, model_state)
    y, _ = block.forward(*own, x, key)
    if block.inverse is not None:
      error = relative_error(block.inverse(*own, y, key), x)
      errors[block.name] = float(error)
      if not error <= tolerance:
        raise ValueError(
          f"stages: block {block.name!r} is declared reversible, but its "
          f"inverse misses a random input by {float(error):.2g} of its norm "
          f"(at most {tolerance:g}). Mend the inverse, or declare the block "
          "with stages.plain."
        )
    x = y
  return errors


def relative_error(x: Any, of: Any) -> jax.Array:
  """|x - of| / |of| over all leaves, in float32: ()."""
  square = lambda t: sum(
    jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(t)
  )
  difference = jax.tree.map(jnp.subtract, x, of)
  return jnp.sqrt(square(difference) / jnp.maximum(square(of), 1e-30))


def loss_fn(
  blocks: Sequence[Block],
  *,
  inputs: str | None = None,
  keep_activations: bool = True,
) -> Callable[..., Any]:
  """The whole network's loss, for any method that takes one.

  Args:
    blocks: of the network, the last with its loss.
    inputs: as for `inputs_and_targets`.
    keep_activations: False: reversible back-propagation. The backward pass
      reconstructs what goes into neighbouring reversible blocks from what the
      last of them returned, which alone is kept.

  Returns:
    `(params, model_state, batch, key) -> (loss, (aux, model_state))`: pass it
    to `stateful`. params {block: tree}, model_state {collection: {block:
    tree}}.
  """
  blocks = check_blocks(blocks)

  def fn(params, model_state, batch, key):
    x, targets = inputs_and_targets(batch, inputs)
    keys = [jax.random.fold_in(key, i) for i in range(len(blocks))]
    own = [of_block(b.name, params, model_state) for b in blocks]
    states = {}
    for run in _runs(blocks, not keep_activations):
      names = [blocks[i].name for i in run]
      forward = _forward_run(tuple(blocks[i] for i in run))
      if len(run) > 1 or (blocks[run[0]].inverse and not keep_activations):
        forward = _reconstructing(tuple(blocks[i] for i in run))
      elif blocks[run[0]].loss is not None:
        break
      params_run, state_run = zip(*(own[i] for i in run))
      x, new = forward(params_run, state_run, x, tuple(keys[i] for i in run))
      states.update(zip(names, new))
    end = blocks[-1]
    loss, (aux, state) = end.loss(*own[-1], x, targets, keys[-1])
    return loss, (aux, joined(states | {end.name: state}))

  return fn


def _runs(blocks, together: bool) -> list[list[int]]:
  """Positions of the blocks; neighbouring reversible ones together, or not."""
  runs: list[list[int]] = []
  for i, block in enumerate(blocks):
    follows = i > 0 and blocks[i - 1].inverse is not None
    if together and follows and block.inverse is not None:
      runs[-1].append(i)
    else:
      runs.append([i])
  return runs


def _forward_run(blocks):
  def forward(params, states, x, keys):
    new = []
    for block, *own, key in zip(blocks, params, states, keys):
      x, state = block.forward(*own, x, key)
      new.append(state)
    return x, tuple(new)

  return forward


def _reconstructing(blocks):
  """`_forward_run` of reversible blocks, which keeps its result alone."""
  forward = jax.custom_vjp(_forward_run(blocks))

  def keep(params, states, x, keys):
    y, new = _forward_run(blocks)(params, states, x, keys)
    return (y, new), (params, states, y, keys)

  def backward(kept, gradients):
    params, states, y, keys = kept
    dy, _ = gradients
    grads = []
    for block, *own, key in list(zip(blocks, params, states, keys))[::-1]:
      back = block.reverse(*own, y, dy, key)
      y, dy = back.x, back.dx
      grads.append(back.grads)
    return tuple(grads[::-1]), _no_gradient(states), dy, _no_gradient(keys)

  forward.defvjp(keep, backward)
  return forward


def _no_gradient(tree):
  def one(x):
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
      return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)

  return jax.tree.map(one, tree)


def parts(model: Any) -> tuple[Any, Any]:
  """(params, model_state) of what a user passes as params."""
  if isinstance(model, Variables):
    return model.params, model.model_state
  return model, {}


def described(tree: Any) -> str:
  """Shapes and dtypes in words."""
  leaves = jax.tree.leaves(tree)
  return ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves)
