"""The learned rule's network as Pallas kernels: hidden units stay on chip.

As `tiles`, over blocks of 8 rows and up to 1024 columns of a matrix. Elements
of a row run along lanes, features and hidden units along sublanes, so that a
layer is a product (out, in) x (in, lanes). Only the arrays that a step reads
and the one that it writes travel to and from memory.

That is the kernel for TPUs; `kernel_gpu` has the one for GPUs, and `direction`
takes the one that the program is compiled for. Anywhere else `tiles` is what
runs, but for tests, which interpret them. Letters in shapes: r rows, c columns,
l lanes of a block, h hidden units.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distrain_jax.learned import kernel_gpu, tiles
from distrain_jax.learned.moments import Moments
from distrain_jax.learned.theta import Theta
from distrain_jax.learned.tiles import Folded, Inputs

ROWS, LANES = 8, 1024


def fits(shape: tuple[int, ...]) -> bool:
  """Whether a parameter is a matrix with rows that fill lanes.

  >>> fits((64, 256)), fits((256,)), fits((3, 3, 64, 256)), fits((64, 10))
  (True, False, False, False)
  """
  return len(shape) == 2 and shape[0] >= ROWS and shape[1] >= 128


def _body(*refs, exp_mult, precision, treedef):
  *given, out = refs
  x, net = treedef.unflatten(given)
  net = jax.tree.map(lambda ref: ref[...], net)
  dot = functools.partial(
    jnp.dot, precision=precision, preferred_element_type=jnp.float32
  )

  def side(kernel, few):
    """kernel (h, 6) on 6 features of a row (6, 1) or of columns (6, l)."""
    few = jnp.concatenate([few, jax.lax.rsqrt(few + 1e-8)])
    terms = [kernel[:, k : k + 1] * few[k : k + 1] for k in range(6)]
    return functools.reduce(jnp.add, terms)

  for row in range(ROWS):  # of the block
    # What all rows share has one row in its block.
    take = lambda ref, row=row: ref[:, row if ref.shape[1] > 1 else 0, :]
    own = jax.tree.map(take, x)
    hidden = dot(net.element, tiles.element_features(own))  # (h, l)
    hidden += side(net.row, own.sides.row) + side(net.col, own.sides.col)
    hidden = jnp.maximum(hidden + net.b0, 0)
    hidden = jnp.maximum(dot(net.w1, hidden) + net.b1, 0)
    both = dot(net.w2, hidden) + net.b2  # (2, l)
    out[row : row + 1, :] = both[0:1] * jnp.exp(exp_mult * both[1:2])


def _spec(shape, lanes) -> pl.BlockSpec:
  """Of an array (k, r or 1, c or 1)."""
  k, r, c = shape
  block = (k, ROWS if r > 1 else 1, lanes if c > 1 else 1)
  index = lambda i, j: (0, i if r > 1 else 0, j if c > 1 else 0)
  return pl.BlockSpec(block, index)


def network(
  net: Folded,
  x: Inputs,
  exp_mult: float,
  precision: str,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `tiles.network`, of a whole matrix (r, c).

  Args:
    net: the network, normalisers folded in.
    x: (k, r, c) each, or 1 in the place of r or c.
    exp_mult: of the second output.
    precision: of the products.
    interpret: run as plain JAX, on any backend.
  """
  _, r, c = x.grad.shape
  lanes = min(LANES, -(-c // 128) * 128)
  column = lambda b: b[:, None]
  net = net._replace(b0=column(net.b0), b1=column(net.b1), b2=column(net.b2))
  whole = lambda a: pl.BlockSpec(a.shape, lambda i, j: (0, 0))
  specs = (
    jax.tree.map(lambda a: _spec(a.shape, lanes), x),
    jax.tree.map(whole, net),
  )
  flat, treedef = jax.tree.flatten((x, net))
  body = functools.partial(
    _body, exp_mult=exp_mult, precision=precision, treedef=treedef
  )
  return pl.pallas_call(
    body,
    grid=(pl.cdiv(r, ROWS), pl.cdiv(c, lanes)),
    in_specs=treedef.flatten_up_to(specs),
    out_specs=pl.BlockSpec((ROWS, lanes), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((r, c), jnp.float32),
    interpret=interpret,
  )(*flat)


def direction(
  theta: Theta,
  grad: jax.Array,
  param: jax.Array,
  moments: Moments,
  count: jax.Array,
  *,
  exp_mult: float,
  feature_eps: float,
  precision: str,
  tile: int | None = None,
  interpret: str | None = None,
) -> jax.Array:
  """As `tiles.direction`, by a kernel where the parameter `fits` it.

  Args:
    theta: as for `tiles.direction`, as the others that are not named here.
    grad: (r, c) for a kernel.
    param: (r, c).
    moments: of the parameter.
    count: updates made before this one.
    exp_mult: of the network's second output.
    feature_eps: under the root that normalises features.
    precision: of the products on a TPU; on a GPU they are float32's own.
    tile: elements at once where features are measured; None: as there.
    interpret: "tpu" or "cuda": that platform's kernel as plain JAX, on any
      backend. None: the kernel of the platform that is compiled for.
  """
  options = {
    "exp_mult": exp_mult,
    "feature_eps": feature_eps,
    "precision": precision,
    "tile": tile,
  }
  plain = functools.partial(tiles.direction, **options)

  def fused(network):
    def run(theta, grad, param, moments, count):
      x = tiles.inputs(grad, param, moments)
      parts = tiles.cut_up(x, tile or tiles.TILE)
      sizes = tiles.mean_squares(parts, grad.size)
      net = tiles.fold(theta, count, sizes, x.sides, feature_eps)
      return network(net, x, exp_mult, interpret=interpret is not None)

    return run

  kernels = {}
  if fits(grad.shape):
    kernels["tpu"] = fused(functools.partial(network, precision=precision))
  if kernel_gpu.fits(grad.shape) and kernel_gpu.supported():
    kernels["cuda"] = fused(kernel_gpu.network)
  args = (theta, grad, param, moments, count)
  if interpret is not None:
    return kernels.get(interpret, plain)(*args)
  if not kernels:
    return plain(*args)
  # Decided by where the program is compiled for, not by what is attached.
  return jax.lax.platform_dependent(*args, **kernels, default=plain)
