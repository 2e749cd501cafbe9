"""The table of a tree's arrays: path, shape, dtype, axes, sharding, bytes."""

import math
from collections.abc import Iterator
from numbers import Number
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from distrain_jax.inspect import table


class Leaf(NamedTuple):
  """One array; sizes in bytes."""

  path: str  # keys, attributes and indices from the root: "dense_0/kernel"
  shape: tuple[int, ...]
  dtype: str
  names: tuple[str | None, ...] | None  # logical axes, where they are known
  sharding: str | None  # None: not placed, such as a NumPy array
  elements: int
  bytes: int  # of the global array, however many devices hold it
  device_bytes: int | None  # on each device that holds it


class Total(NamedTuple):
  """All leaves together."""

  arrays: int
  elements: int
  bytes: int
  device_bytes: int | None  # on the fullest device; None: nothing is placed


class Tree(NamedTuple):
  """What `tree` returns; prints as a table, in a notebook too."""

  rows: tuple[Leaf, ...]
  total: Total

  def __str__(self) -> str:
    headers, rows, align, footer = self._cells()
    return table.render(headers, rows, align, footer=footer)

  __repr__ = __str__

  def _repr_html_(self) -> str:
    headers, rows, align, footer = self._cells()
    return table.render_html(headers, rows, align, footer=footer)

  def to_json(self) -> dict[str, Any]:
    """{"rows": [{"path": ..., ...}], "total": {...}}, for `json.dumps`."""
    rows = [row._asdict() for row in self.rows]
    return {"rows": rows, "total": self.total._asdict()}

  def _cells(self):
    """Headers, rows, alignment and footer, without columns of nothing."""
    rows, total = self.rows, self.total
    sizes = [_bytes(x.bytes) for x in rows]
    held = [_bytes(x.device_bytes) for x in rows]
    axes = [None if x.names is None else _axes(x.names) for x in rows]
    columns = [
      ("path", "l", [x.path for x in rows], "total"),
      ("shape", "l", [str(x.shape) for x in rows], None),
      ("dtype", "l", [x.dtype for x in rows], None),
      ("axes", "l", axes, None),
      ("sharding", "l", [x.sharding for x in rows], None),
      ("elements", "r", [x.elements for x in rows], total.elements),
      ("bytes", "r", sizes, _bytes(total.bytes)),
      ("bytes a device", "r", held, _bytes(total.device_bytes)),
    ]
    known = lambda column: any(cell is not None for cell in column[2])
    columns = [c for c in columns if known(c) or not rows]
    headers, align, cells, foot = zip(*columns)
    return headers, list(zip(*cells)), "".join(align), [foot]


def tree(params: Any, *, names: Any = None) -> Tree:
  """The table of every array in a pytree; nothing is computed or moved.

  Args:
    params: a model's parameters, a `Run`'s state, or any pytree of arrays,
      `jax.ShapeDtypeStruct`s, NumPy arrays, numbers and PRNG keys. Flax's boxes
      (`nn.LogicallyPartitioned`, `nnx.Variable`) are opened. Leaves that are no
      arrays, such as an Equinox module's functions, are left out.
    names: the logical axes: params' structure with a tuple of names, one an
      axis, for each array (`models.logical_names`), or None for a subtree
      without any. If names itself is None, the boxes' names are shown.

  Returns:
    A `Tree`: `print` it, show it in a notebook, or read `rows` and `total`.

  Raises:
    ValueError: if names does not match params; says at which path.

  >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}
  >>> print(tree(params, names={"w": ("embed", "mlp")}))
  path   shape   dtype     axes        elements  bytes
  -----  ------  --------  ----------  --------  -----
  w      (8, 4)  bfloat16  embed, mlp        32   64 B
  -----  ------  --------  ----------  --------  -----
  total                                      32   64 B
  """
  leaves = list(_leaves(params))
  if names is not None:
    leaves = _named(leaves, names)
  rows = tuple(_row(*leaf) for leaf in leaves)
  held: dict[Any, int] = {}
  for row, (_, x, _) in zip(rows, leaves):
    for device in _devices(getattr(x, "sharding", None)):
      held[device] = held.get(device, 0) + row.device_bytes
  total = Total(
    arrays=len(rows),
    elements=sum(row.elements for row in rows),
    bytes=sum(row.bytes for row in rows),
    device_bytes=max(held.values(), default=None),
  )
  return Tree(rows, total)


def _leaves(params) -> Iterator[tuple[tuple, Any, tuple | None]]:
  """(path, array, the box's names) of every array."""
  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata | nnx.Variable)
  for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
    given, value = _open(x) if is_box(x) else (None, x)
    for below, array in jax.tree_util.tree_leaves_with_path(value):
      if hasattr(array, "dtype") or isinstance(array, Number):
        yield path + below, array, None if below else given


def _open(box) -> tuple[tuple | None, Any]:
  """A box's names and what is in it."""
  if isinstance(box, nnx.Variable):
    given = box.get_metadata().get("out_sharding")
    return None if given is None else tuple(given), box.get_value()
  given = getattr(box, "names", None)
  # Not `unbox`, which would constrain the sharding under a mesh.
  value = box.value if hasattr(box, "value") else box.unbox()
  return None if given is None else tuple(given), value


def _named(leaves, names):
  """The leaves with what `names` says in place of the boxes' names."""
  found = jax.tree_util.tree_leaves_with_path(names, is_leaf=_is_names)
  given = {_keys(path): value for path, value in found}
  used, out = set(), []
  for path, x, _ in leaves:
    keys = _keys(path)
    # Here, or above by a None that stands for a subtree.
    above = [keys[:k] for k in range(len(keys))]
    above = [k for k in above if k in given and given[k] is None]
    at = keys if keys in given else next(iter(above), None)
    if at is None:
      raise ValueError(
        f"tree: `names` has nothing at {_path(path)}, where params has an "
        f"array of shape {jnp.shape(x)}. Give it a tuple of axis names, or None."
      )
    used.add(at)
    _check_names(given[at], path, x)
    out.append((path, x, given[at]))
  for keys, value in given.items():
    if value and keys not in used:  # () may be a container without arrays
      raise ValueError(
        f"tree: `names` has {value!r} at {'/'.join(keys)}, where params has no "
        "array."
      )
  return out


def _is_names(x) -> bool:
  """Not a NamedTuple, nor a tuple of tuples: those are nodes of the tree."""
  is_name = lambda n: n is None or isinstance(n, str)
  return x is None or (type(x) is tuple and all(map(is_name, x)))


def _check_names(value, path, x) -> None:
  if not _is_names(value):
    raise ValueError(
      f"tree: `names` has {value!r} at {_path(path)}; expected a tuple of axis "
      "names, or None."
    )
  if value is not None and len(value) != jnp.ndim(x):
    raise ValueError(
      f"tree: `names` has {value!r} at {_path(path)}: {len(value)} axes, but "
      f"the array there has shape {jnp.shape(x)}."
    )


def _bytes(n: int | None) -> str | None:
  return None if n is None else table.bytes_text(n)


def _axes(names) -> str:
  return ", ".join("-" if name is None else str(name) for name in names)


def _row(path, x, names) -> Leaf:
  if not hasattr(x, "dtype"):
    x = jax.ShapeDtypeStruct((), jnp.result_type(x))  # a Python number
  sharding = getattr(x, "sharding", None)
  size = math.prod(x.shape)
  device_bytes = None
  if sharding is not None:
    shard = math.prod(sharding.shard_shape(tuple(x.shape)))
    device_bytes = shard * x.dtype.itemsize
  return Leaf(
    path=_path(path),
    shape=tuple(x.shape),
    dtype=str(x.dtype),
    names=names,
    sharding=_sharding_text(sharding),
    elements=size,
    bytes=size * x.dtype.itemsize,
    device_bytes=device_bytes,
  )


def _sharding_text(sharding) -> str | None:
  """Short: what differs between the rows of one table."""
  if isinstance(sharding, SingleDeviceSharding):
    (device,) = sharding.device_set
    return f"{device.platform}:{device.id}"
  if isinstance(sharding, NamedSharding):
    spec = sharding.spec
    return f"P({', '.join(map(repr, spec))})" if any(spec) else "replicated"
  return None if sharding is None else str(sharding)


def _devices(sharding):
  """Who holds an array; an abstract mesh's devices are all alike."""
  if sharding is None:
    return ()
  if isinstance(getattr(sharding, "mesh", None), AbstractMesh):
    return ("any",)
  return sharding.device_set


def _keys(path) -> tuple[str, ...]:
  """Of a path, the same for a dict, an nnx.State or a dataclass."""
  return tuple(
    jax.tree_util.keystr((key,), simple=True, separator="/") for key in path
  )


def _path(path) -> str:
  return "/".join(_keys(path))
