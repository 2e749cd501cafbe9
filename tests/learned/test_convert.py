"""PyTorch's layout and ours, on synthetic tensors."""

import jax
import numpy as np
import pytest

from distrain_jax import learned


def torch_tensors():
  rng = np.random.default_rng(0)
  shapes = {"input": (32, 39), "linear_0": (32, 32), "output": (2, 32)}
  found = {}
  for name, shape in shapes.items():
    draw = lambda *s: rng.normal(size=s).astype(np.float32)
    found[f"network.{name}.weight"] = draw(*shape)
    found[f"network.{name}.bias"] = draw(shape[0])
  return found


def test_kernels_are_transposed_and_compute_the_same():
  tensors = torch_tensors()
  theta = learned.theta_from_torch(tensors)
  x = np.random.default_rng(1).normal(size=39).astype(np.float32)
  theirs, ours = x, x
  for i, name in enumerate(("input", "linear_0", "output")):
    weight, bias = (tensors[f"network.{name}.{p}"] for p in ("weight", "bias"))
    theirs = weight @ theirs + bias
    ours = ours @ theta[f"w{i}"] + theta[f"b{i}"]
  np.testing.assert_allclose(theirs, ours, rtol=1e-5)
  m = learned.decay_rates(theta)[0]
  np.testing.assert_allclose(m[0], 0.5421, atol=1e-4)


def test_there_and_back_is_the_same_to_the_bit():
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  again = learned.theta_from_torch(*learned.theta_to_torch(theta))
  jax.tree.map(np.testing.assert_array_equal, dict(theta), again)


def test_prefixes_may_be_missing_but_tensors_may_not():
  tensors = torch_tensors()
  short = {name.removeprefix("network."): x for name, x in tensors.items()}
  jax.tree.map(
    np.testing.assert_array_equal,
    learned.theta_from_torch(short),
    learned.theta_from_torch(tensors),
  )
  del short["output.bias"]
  with pytest.raises(ValueError, match=r"no tensor network\.output\.bias"):
    learned.theta_from_torch(short)
  tensors["network.input.weight"] = np.ones((32, 30), "f4")
  with pytest.raises(ValueError, match=r"'w0'.*\(30, 32\), wanted \(39, 32\)"):
    learned.theta_from_torch(tensors)
