"""Any function of whole parameters, on parameters that are gathered by use.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel", 2023, https://arxiv.org/abs/2304.11277, gathers a module's
parameters before the module runs. Here the function is traced, and its
program is evaluated with a `Shard` in the place of each cut parameter:

- What is computed of parameters alone and is cheap stays unevaluated.
- Where a parameter meets something else it is gathered, inside a
  `jax.checkpoint` that saves nothing: the backward pass gathers again, and no
  whole parameter lives from one pass to the other.
- A scan over stacked layers becomes one whose body gathers its layer.
- A checkpoint of the function's own keeps its policy, and gathers inside.

What all iterations of a loop share (a scan's constants), and what a branch or
a while loop takes, is gathered once before it and kept.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.extend.core.primitives as p
from jax import lax

from distrain_jax.shard import MOVES, Shard, moved

# Each element of the result depends on the same element of the operands.
ELEMENTWISE = frozenset().union(
  ("abs", "add", "cbrt", "copy", "cos", "div", "exp", "exp2", "expm1"),
  ("integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg"),
  ("pow", "reduce_precision", "rsqrt", "sign", "sin", "sqrt", "square"),
  ("stop_gradient", "sub", "tanh"),
)
# Not worth storing: computed again from the gathered parameter. Functions with
# gradients of their own are here for activations and roundings of weights.
CHEAP = ELEMENTWISE.union(
  MOVES,
  ("concatenate", "custom_jvp_call", "custom_vjp_call", "dynamic_slice"),
  ("pad", "reduce_max", "reduce_min", "reduce_sum", "sharding_constraint"),
)
NEVER_SAVED = frozenset(["all_gather", *MOVES])


class Level(NamedTuple):
  """Where in the program an equation is."""

  # In a scan's body: XLA cannot merge the backward pass, another loop, with
  # the forward pass.
  looped: bool = False
  # Directly in a checkpoint of the function's own, which gathers again.
  recomputed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """One equation of a program, to be run on any values."""

  jaxpr: Any
  eqn: Any

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  def __call__(self, values: Iterable) -> list[jax.Array]:
    """The results, in the context that the equation was traced in."""
    eqn = self.eqn
    given = [(v, x) for v, x in zip(eqn.invars, values) if not _literal(v)]
    alone = self.jaxpr.replace(
      constvars=[],
      invars=[v for v, _ in given],
      outvars=eqn.outvars,
      eqns=[eqn],
      effects=eqn.effects,
    )
    run = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(alone, ()))
    return run(*(x for _, x in given))


@dataclasses.dataclass(frozen=True, eq=False)
class Later:
  """A result of an operation on parameters that are not gathered yet."""

  op: Op
  values: list  # Shard, Later, or an array of shape ()
  index: int  # among the operation's results


def gathered_by_use(fn: Callable) -> Callable:
  """`fn`, for arguments whose leaves may be `Shard`s.

  fn sees whole parameters and must be traceable. The gradient of a Shard's
  piece is this worker's piece of the SUM of the workers' gradients. Works
  where the shards' axis is a named axis.
  """

  def call(*args):
    leaves, treedef = jax.tree.flatten(args)
    whole = [
      jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Shard) else x
      for x in leaves
    ]
    flat = lambda *leaves: fn(*treedef.unflatten(leaves))
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*whole)
    out = _evaluate(closed, leaves, Level())
    return jax.tree.structure(shape).unflatten(_gathered(out))

  return call


def _evaluate(closed, args: Iterable, level: Level) -> list:
  """A program's results, some of them still lazy."""
  jaxpr = getattr(closed, "jaxpr", closed)  # one class since jax 0.12
  names = [*jaxpr.constvars, *jaxpr.invars]
  env = dict(zip(names, [*getattr(closed, "consts", ()), *args]))
  read = lambda v: v.val if _literal(v) else env[v]
  for eqn in jaxpr.eqns:
    op, values = Op(jaxpr, eqn), list(map(read, eqn.invars))
    out = None
    if any(map(_is_lazy, values)):
      out = RULES.get(eqn.primitive, _stay_lazy)(op, values, level)
      if out is None and level.recomputed:
        values = _gathered(values)  # now for all that follows
        env.update(
          (v, x) for v, x in zip(eqn.invars, values) if not _literal(v)
        )
    if out is None:
      out = _use(op, values, level)
    env.update(zip(eqn.outvars, out))
  return list(map(read, jaxpr.outvars))


def _literal(v) -> bool:
  return isinstance(v, jex.core.Literal)


def _is_lazy(x) -> bool:
  return isinstance(x, (Shard, Later))


def _gathered(values: Iterable) -> list[jax.Array]:
  """All as arrays; what they share is gathered once."""
  known = {}

  def one(x):
    if not _is_lazy(x):
      return x
    if id(x) not in known:
      if isinstance(x, Shard):
        known[id(x)] = x.gathered()
      else:
        known[id(x)] = x.op(map(one, x.values))[x.index]
    return known[id(x)]

  return list(map(one, values))


def _stay_lazy(op: Op, values: list, level: Level) -> list | None:
  """The results of what needs no other worker's piece yet; None: it does."""
  del level
  if op.name in MOVES and len(values) == 1 and isinstance(values[0], Shard):
    out = moved(op.name, values[0], op.eqn.params)
    if out is not None:
      return out
  if op.name in ELEMENTWISE and _on_pieces(op, values):
    shard = next(x for x in values if isinstance(x, Shard))
    pieces = [x.piece if isinstance(x, Shard) else x for x in values]
    piece = op.eqn.primitive.bind(*pieces, **op.eqn.params)
    return [shard.holding(piece, shard.dim)]
  small = (
    _is_lazy(x) or not v.aval.ndim for v, x in zip(op.eqn.invars, values)
  )
  # A result of shape () is no burden; a sum over all parameters, kept as what
  # it is made of, would gather them together.
  if op.name in CHEAP and all(small) and op.eqn.outvars[0].aval.ndim:
    return [Later(op, values, i) for i in range(len(op.eqn.outvars))]
  return None


def _on_pieces(op: Op, values: list) -> bool:
  """Whether the operands' pieces give the piece of an elementwise result."""
  places, dtype = set(), op.eqn.outvars[0].aval.dtype
  for v, x in zip(op.eqn.invars, values):
    if isinstance(x, Shard) and x.dtype == x.piece.dtype == dtype:
      places.add((x.dim, x.axis, x.piece.shape))
    elif not _literal(v) or v.aval.ndim:
      return False  # another array may differ by worker
  return len(places) == 1


def _use(op: Op, values: list, level: Level) -> list[jax.Array]:
  """An operation on whole parameters, which its gradient gathers again."""
  if not any(map(_is_lazy, values)):
    return op(values)
  inner = any(True for _ in jex.core.jaxprs_in_params(op.eqn.params))
  policy = None  # save nothing: one primitive's gradient needs its operands
  if op.eqn.primitive in (p.custom_jvp_call_p, p.custom_vjp_call_p):
    policy = _without_gathers(jax.checkpoint_policies.everything_saveable)
  elif inner or op.eqn.effects:
    # A checkpoint around it would override those inside.
    return op(_gathered(values))
  checkpoint = jax.checkpoint(
    lambda: op(_gathered(values)), prevent_cse=not level.looped, policy=policy
  )
  return checkpoint()


def _without_gathers(policy: Callable | None) -> Callable | None:
  """A checkpoint policy that saves no parameter, whatever it would."""
  if policy is None:
    return None

  def saves(prim, *args, **params):
    again = prim.name in NEVER_SAVED
    if prim is p.custom_vjp_call_p:
      inner = jex.core.jaxprs_in_params(params)
      again = any(e.primitive is p.all_gather_p for j in inner for e in j.eqns)
    return not again and policy(prim, *args, **params)

  return saves


def _inline(op: Op, values: list, level: Level) -> list:
  (inner,) = (
    x for x in op.eqn.params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")
  )
  return _evaluate(inner, values, level)


def _checkpoint(op: Op, values: list, level: Level) -> list | None:
  params = op.eqn.params
  if params["differentiated"]:
    return None  # a gradient that the function itself took
  level = level._replace(recomputed=True)
  arrays = [None if _is_lazy(x) else x for x in values]

  def body(*arrays):
    args = [x if _is_lazy(x) else a for x, a in zip(values, arrays)]
    return _gathered(_evaluate(params["jaxpr"], args, level))

  barrier = params["prevent_cse"]  # one for all, or one an operand
  return jax.checkpoint(
    body,
    prevent_cse=any(barrier) if isinstance(barrier, tuple) else barrier,
    policy=_without_gathers(params["policy"]),
  )(*arrays)


def _scan(op: Op, values: list, level: Level) -> list[jax.Array]:
  eqn, closed = op.eqn, op.eqn.params["jaxpr"]
  # The operands and results that have one axis more than in the body.
  longer = lambda outer, inner: outer.aval.ndim > inner.aval.ndim
  jaxpr = getattr(closed, "jaxpr", closed)
  xs = sum(map(longer, eqn.invars, jaxpr.invars))
  ys = sum(map(longer, eqn.outvars, jaxpr.outvars))
  carried, sliced = len(eqn.outvars) - ys, len(values) - xs
  fixed = _gathered(values[:sliced])
  consts, init = fixed[: sliced - carried], fixed[sliced - carried :]
  stacked = [
    x if isinstance(x, Shard) and x.dim else _gathered([x])[0]
    for x in values[sliced:]
  ]
  level = Level(looped=True)

  def body(carry, slices):
    layer = [
      old.holding(x, old.dim - 1) if isinstance(old, Shard) else x
      for old, x in zip(stacked, slices)
    ]
    out = _gathered(_evaluate(closed, [*consts, *carry, *layer], level))
    return out[:carried], out[carried:]

  carry, ys = lax.scan(
    body,
    init,
    [x.piece if isinstance(x, Shard) else x for x in stacked],
    length=eqn.params["length"],
    reverse=eqn.params["reverse"],
    unroll=eqn.params["unroll"],
  )
  return [*carry, *ys]


# Primitives with programs inside that gather for themselves.
RULES = {
  p.closed_call_p: _inline,
  p.jit_p: _inline,
  p.remat_p: _checkpoint,
  p.scan_p: _scan,
}
