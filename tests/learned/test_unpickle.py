"""Pickled weights: read without running them, refused by name."""

import collections
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import learned
from distrain_jax.learned import unpickle

RAN = []


@pytest.fixture(scope="module")
def theta():
  made = jax.jit(learned.init_theta)(jax.random.key(0))
  noise = np.random.default_rng(0).normal(size=3).astype(np.float32)
  return {**jax.device_get(made), "momentum_decays": noise}


def theirs(theta):
  """The layout of the original: layers under Haiku's module `~`."""
  layers = {k: v for k, v in theta.items() if k[0] in "wb"}
  rest = {k: v for k, v in theta.items() if k not in layers}
  return {"nn": {"~": layers}, **rest}


@pytest.fixture
def write(tmp_path):
  def to_file(tree, protocol=4):
    path = tmp_path / "theta.pickle"
    raw = tree if isinstance(tree, bytes) else pickle.dumps(tree, protocol)
    path.write_bytes(raw)
    return path

  return to_file


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_theta_is_read_to_the_bit(protocol, kind, theta, write):
  convert = np.asarray if kind == "numpy" else jnp.asarray
  tree = jax.tree.map(convert, theirs(theta))
  got = unpickle.theta_from_pickle(write(tree, protocol))
  equal(got, theta)
  assert all(x.dtype == np.float32 for x in got.values())


class Flat(dict):
  """Pickles as Haiku's FlatMapping does: its name, and a plain dict."""

  def __reduce__(self):
    return sys.modules["haiku._src.data_structures"].FlatMapping, (dict(self),)


@pytest.fixture
def haiku(monkeypatch):
  module = types.ModuleType("haiku._src.data_structures")
  kind = type("FlatMapping", (), {"__module__": module.__name__})
  module.FlatMapping = kind
  for name in ("haiku", "haiku._src"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, module.__name__, module)


def test_mappings_of_haiku_need_no_haiku(theta, write, haiku, monkeypatch):
  tree = theirs(theta)
  tree["nn"] = Flat({"~": Flat(tree["nn"]["~"])})
  path = write(collections.OrderedDict(step=7, theta=tree))
  monkeypatch.undo()  # no longer there when it is read
  assert "haiku" not in sys.modules
  equal(unpickle.theta_from_pickle(path), theta)


def test_layouts_and_byte_orders_of_arrays(write):
  x = np.arange(6.0).reshape(2, 3)
  kinds = [x, x.T, x.astype(">f4"), x.astype("i2"), x[0, 1], np.array(3)]
  for protocol in (2, 4, 5):
    got = unpickle.read_pickle(write(kinds, protocol))
    for a, b in zip(got, kinds):
      np.testing.assert_array_equal(a, b)
      assert np.shape(a) == np.shape(b)


class Shell:
  def __reduce__(self):
    import os

    return os.system, ("exit 1",)


def state_of_a_name():
  """BUILD on what a name stands for, which sets attributes in plain pickle."""
  return b"cnumpy\nndarray\n(N}S'value'\nI1\nstb."


@pytest.mark.parametrize(
  ("given", "says"),
  [
    (Shell(), r"asks for (posix|nt)\.system"),
    ({"nn": {"~": Shell()}}, r"asks for (posix|nt)\.system"),
    (b"c__builtin__\neval\n(S'1'\ntR.", r"asks for __builtin__\.eval"),
    (b"cbuiltins\ngetattr\n.", r"asks for builtins\.getattr"),
    (b"cnumpy\nload\n.", r"asks for numpy\.load"),
    (b"cnumpy\nndarray.__class__\n.", r"asks for numpy\.ndarray\.__class__"),
    (b"Pname\n.", "refers to 'name', outside of the file"),
    (state_of_a_name(), "sets the state of a name"),
    (b"cnumpy\nndarray\n.", "holds _Name"),
    ({"x": np.array([object], object)}, "arrays of dtype 'O8'"),
    ({"x": {1, 2}}, "it holds set"),
    ({("x", 1): 2}, "it has a key of tuple"),
    (b"not a pickle", "is no pickle"),
    (b"", "is no pickle"),
  ],
)
def test_anything_else_is_refused_by_name_and_not_run(given, says, write):
  with pytest.raises(ValueError, match=says):
    unpickle.read_pickle(write(given))


def test_what_plain_pickle_would_run_is_not(write):
  path = write(b"ctest_unpickle_target\nrun\n(tR.")
  target = types.ModuleType("test_unpickle_target")
  target.run = lambda: RAN.append(1)
  sys.modules[target.__name__] = target
  try:
    with pytest.raises(ValueError, match=r"asks for test_unpickle_target\.run"):
      unpickle.read_pickle(path)
    assert not RAN
    pickle.loads(path.read_bytes())
    assert RAN == [1]  # so the pickle does run something
  finally:
    del sys.modules[target.__name__]
    RAN.clear()


def test_arrays_that_lie_about_their_size_are_refused(write):
  raw = pickle.dumps(np.ones(4, np.float32), 2)
  path = write(raw.replace(b"K\x04\x85", b"M\xff\xff\x85"))
  with pytest.raises(ValueError, match="is no pickle of dicts"):
    unpickle.read_pickle(path)


def test_a_pickle_without_theta_says_what_it_has(theta, write):
  with pytest.raises(ValueError, match=r"0 mappings.*root are \['a'\]"):
    unpickle.theta_from_pickle(write({"a": np.ones(3)}))
  two = [theirs(theta), theirs(theta)]
  with pytest.raises(ValueError, match="2 mappings"):
    unpickle.theta_from_pickle(write(two))
  few = theirs(theta)
  del few["nn"]["~"]["b2"]
  with pytest.raises(ValueError, match=r"lacks \['b2'\]"):
    unpickle.theta_from_pickle(write(few))


@pytest.mark.parametrize("fork", ["lists", "tuples", "dicts"])
def test_references_that_double_at_each_level_are_refused(fork, theta, write):
  """Written out, 2 ** 60 values; pickled, each level once."""
  make = {
    "lists": lambda x: [x, x],
    "tuples": lambda x: (x, x),
    "dicts": lambda x: {"nn": x, "b": x},
  }[fork]
  tree = theirs(theta)
  for _ in range(60):
    tree = make(tree)
  path = write(tree)
  assert path.stat().st_size < 20_000
  with pytest.raises(ValueError, match="it holds more than 100,000 values"):
    unpickle.theta_from_pickle(path)


def test_messages_about_shared_things_end(write):
  """The state of a dtype is tuples of 2 ** 60 nothings."""
  raw = b"cnumpy\ndtype\n(S'f4'\ntR(" + b"N" + b"2\x86" * 60 + b"tb."
  with pytest.raises(ValueError, match="it has a dtype's state"):
    unpickle.read_pickle(write(b"\x80\x02" + raw))


def test_a_few_shared_values_are_read_as_often(theta, write):
  x = np.ones(3)
  a, b = unpickle.read_pickle(write([[x, 1], [x, 1]]))
  assert a[1] == b[1] == 1
  equal({"x": a[0], "y": b[0]}, {"x": x, "y": x})
  path = write({"a": [7] * 1000, "theta": theirs(theta)})
  equal(unpickle.theta_from_pickle(path), theta)


def test_a_file_that_is_too_large_is_not_read(write, monkeypatch):
  monkeypatch.setattr(unpickle, "LARGEST", 100)
  with pytest.raises(ValueError, match="nothing above 100 is read"):
    unpickle.read_pickle(write({"x": np.ones(100)}))
