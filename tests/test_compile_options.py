"""What the table of compile options claims, seen in compiled programs."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import compile_options
from distrain_jax.inspect import topologies

pytestmark = pytest.mark.core

# Micro-batches, rows, width, layers; LAYERS * WIDTH**2 floats travel in each
# iteration.
TIMES, ROWS, WIDTH, LAYERS = 4, 256, 512, 2
OPTIONS = {
  name: entry.options for name, entry in compile_options.OPTIONS.items()
}
SCATTER, REDUCE, EXCHANGE, COMBINE = OPTIONS.values()
LOOP = " while("  # an inner loop over the layers


def shaped(mesh, shape, *spec):
  where = NamedSharding(mesh, P(*spec))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


def gradient(w, x):
  layer = lambda h, w: (jnp.tanh(h @ w), None)
  return jax.grad(lambda w: jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2))(w)


def beside(send, w, x, slices):
  """Gradients of micro-batches; each iteration sends a slice meanwhile.

  What was received is carried to the next iteration and stored there.
  """
  like = jax.eval_shape(send, slices[0])
  zeros = jnp.zeros(like.shape, like.dtype)

  def body(carry, this):
    total, store, got = carry
    i, x, piece = this
    store = store.at[jnp.maximum(i - 1, 0)].set(got)
    return (total + gradient(w, x), store, send(piece)), None

  start = (jnp.zeros_like(w), jnp.zeros((TIMES, *like.shape)), zeros)
  xs = (jnp.arange(TIMES), x, slices)
  (total, store, got), _ = jax.lax.scan(body, start, xs)
  return total, store.at[-1].set(got)


def overlapped(mesh, *sends):
  """A step that has something to compute beside each of its collectives."""
  n = mesh.size
  rows = LAYERS * WIDTH**2 // n // 1024

  def local(w, x, slices):
    total, slices = 0.0, slices[0]
    for send in sends:
      more, slices = beside(send, w, x[0], slices)
      total = total + more
    return total[None], slices[None]

  f = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(), P("data"), P("data")),
    out_specs=P("data"),
    check_vma=False,
  )
  return jax.jit(f).lower(
    shaped(mesh, (LAYERS, WIDTH, WIDTH)),
    shaped(mesh, (n, TIMES, ROWS, WIDTH), "data"),
    shaped(mesh, (n, TIMES, n, rows, 1024), "data"),
  )


def scatter(x):
  return jax.lax.psum_scatter(x, "data", scatter_dimension=0)


def gather(x):
  return jax.lax.all_gather(x, "data")


def reduce(x):
  return jax.lax.psum(x, "data")


def exchange(x):
  return jax.lax.all_to_all(x, "data", 0, 0)


def asynchronous(text, beside=""):
  """Kinds of the collectives that are started, and done after `beside`."""
  bodies = dict(
    re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
  )
  lines, found = text.splitlines(), []
  for i, line in enumerate(lines):
    start = re.search(r"%([\w.-]+) = .* [\w-]+-start\(", line)
    if start is None:
      continue
    names, inside = {start[1]}, line
    for called in re.findall(r"(?:to_apply|calls)=%([\w.-]+)", line):
      inside += bodies[called]
      for deeper in re.findall(
        r"(?:to_apply|calls)=%([\w.-]+)", bodies[called]
      ):
        inside += bodies[deeper]
    kind = re.search(r" (all-[\w-]+?|reduce-scatter)(-start)?\(", inside)
    worked = not beside
    for later in lines[i + 1 :]:
      if any(f"%{name}," in later or f"%{name})" in later for name in names):
        if "-done(" in later:
          break
        names.add(re.search(r"%([\w.-]+) =", later)[1])  # a call-update
      worked |= beside in later
    if kind and worked:
      found.append(kind[1])
  return sorted(found)


def test_v6e_reduces_scatters_and_gathers_beside_compute_with_its_options():
  mesh = topologies.mesh("v6e:2x4", {"data": -1})
  lowered = overlapped(mesh, scatter, gather)
  assert asynchronous(lowered.compile().as_text()) == []
  text = lowered.compile(dict(SCATTER)).as_text()
  assert asynchronous(text, LOOP) == ["all-gather", "reduce-scatter"]


def test_v6e_all_reduces_beside_compute_with_its_option():
  mesh = topologies.mesh("v6e:2x4", {"data": -1})
  lowered = overlapped(mesh, reduce)
  assert asynchronous(lowered.compile().as_text()) == []
  text = lowered.compile(dict(REDUCE)).as_text()
  assert asynchronous(text, LOOP) == ["all-reduce"]


def test_v5p_starts_its_all_reduces_and_newer_compilers_its_gathers():
  mesh = topologies.mesh("v5p:2x2x2", {"data": -1})
  lowered = overlapped(mesh, reduce, gather)
  assert asynchronous(lowered.compile().as_text()) == []
  text = lowered.compile({**SCATTER, **REDUCE}).as_text()
  expected = ["all-reduce"]
  if jax.__version_info__ >= (0, 12):
    expected.insert(0, "all-gather")
  assert asynchronous(text) == expected


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2"])
def test_an_all_to_all_runs_beside_compute_with_its_option(name):
  lowered = overlapped(topologies.mesh(name, {"data": -1}), exchange)
  assert asynchronous(lowered.compile().as_text()) == []
  text = lowered.compile(dict(EXCHANGE)).as_text()
  assert asynchronous(text, LOOP) == ["all-to-all"]


def test_tpu7x_needs_no_options():
  mesh = topologies.mesh("tpu7x:2x2x1", {"data": -1})
  text = overlapped(mesh, scatter, gather).compile().as_text()
  assert asynchronous(text, LOOP) == ["all-gather", "reduce-scatter"]


def test_gradients_leave_a_gpu_in_parts_during_the_backward_pass():
  mesh = topologies.mesh("h100:8", {"data": -1})

  def local(ws, x):
    def loss(ws):
      h = x
      for w in ws:
        h = jnp.tanh(h @ w)
      return jnp.mean(h**2)

    return jax.tree.map(reduce, jax.grad(loss)(ws))

  f = jax.shard_map(
    local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
  )
  layers = [shaped(mesh, (1024, 1024)) for _ in range(6)]  # of 4 MiB
  lowered = jax.jit(f).lower(layers, shaped(mesh, (1024, 1024), "data"))
  assert asynchronous(lowered.compile().as_text(), "gemm") == []
  parts = asynchronous(lowered.compile(dict(COMBINE)).as_text(), "gemm")
  assert parts == ["all-reduce"] * 2


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x1", "v6e:2x2", "h100:2"])
def test_every_chips_compiler_takes_its_options(name):
  mesh = topologies.mesh(name, {"data": -1})
  options = compile_options.for_mesh(mesh)
  assert options == compile_options.for_chip(name.partition(":")[0])
  assert options
  x = shaped(mesh, (mesh.size, 1024), "data")
  jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


def test_every_entry_says_what_it_buys_and_costs_for_chips_that_exist():
  known = {*compile_options.KINDS.values(), "gpu"}
  for entry in compile_options.OPTIONS.values():
    assert entry.buys and entry.costs and set(entry.chips) <= known
  assert compile_options.for_chip(None) == {}
  assert compile_options.for_chip("gpu") == compile_options.for_chip("h100")
  with pytest.raises(ValueError, match=r"'v9' is no chip.*gpu, h100, tpu7x"):
    compile_options.for_chip("v9")


def lowered_step(mesh, **options):
  loss_fn = lambda params, batch, key: (jnp.mean((batch @ params) ** 2), {})
  method = dj.ddp(loss_fn, optax.sgd(0.1))
  run = dj.distribute(method, mesh, **options)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
  state = run.abstract(key, params)
  batch = jax.ShapeDtypeStruct((8, 256), jnp.float32)
  return run.step.lower(state, batch, key)


def test_a_distributed_step_compiles_with_the_table_and_with_ones_own(mesh):
  v6e = topologies.mesh("v6e:2x4", {"data": -1})
  started = r" call-start\("
  assert re.search(started, lowered_step(v6e).compile().as_text())
  own = dict.fromkeys(REDUCE, False)
  text = lowered_step(v6e, compiler_options=own).compile().as_text()
  assert not re.search(started, text)
  # On CPUs as ever: no options, and an unknown one is XLA's to refuse.
  assert compile_options.for_mesh(mesh(8)) == {}
  assert compile_options.for_mesh(None) == {}
  with pytest.raises(
    jax.errors.JaxRuntimeError, match="No such compile option"
  ):
    lowered_step(mesh(8), compiler_options={"xla_no_such": True}).compile()
