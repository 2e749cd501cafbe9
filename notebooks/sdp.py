# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # SDP: every worker trains a part of the model
#
# In data parallelism every worker computes with the whole model; sharding, as in
# ZeRO or FSDP, changes where it lies, not how much each worker computes. In
# [Subnetwork Data Parallelism](https://arxiv.org/abs/2507.09029) (Singh et al.,
# 2025) no worker has the whole model. Each trains a network of its own, cut out
# of the large one, from the first layer to the last, on its own data. The parts
# overlap: what several workers hold is averaged among them after every step. At
# the end one puts them together and evaluates the whole, which nobody has trained.
#
# | | what is left out |
# |---|---|
# | neuron level | hidden units and heads, in every layer |
# | block level | residual blocks: the input goes past them, on the shortcut |
#
# | | forward pass | backward pass | gradient |
# |---|---|---|---|
# | forward masking | the worker's part | the worker's part | biased; the cheap one |
# | backward masking | the whole model | the worker's part | unbiased; every worker still receives the whole model |
#
# The **coverage** $C$ is the fraction of what can be left out that a worker holds.
# With $C = 1$ this is DDP. What cannot be left out is shared by all: the input
# layer, the residual stream, the output.
#
# What follows runs on a laptop in less than a minute: eight workers simulated on
# one device, with real data. The end says what to change on a TPU or GPU.

# %%
# Does nothing where the package is there. On a TPU install "distrain-jax[tpu]",
# on NVIDIA GPUs "distrain-jax[cuda]".
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("distrain_jax") is None:
  pip = [sys.executable, "-m", "pip", "install", "--quiet"]
  subprocess.run([*pip, "distrain-jax"], check=True)

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import distrain_jax as dj

WORKERS, BATCH, STEPS = 8, 240, 100
key = jax.random.key(0)

# %% [markdown]
# ## A model that runs on what it is given
#
# Eight residual blocks on scikit-learn's digits, in plain JAX. SDP asks two things
# of a model. Its loss takes every size from the parameters, never from a config:
# the same code then is the whole network and every subnetwork. And each axis of
# each parameter has a **name**: `mlp` and `layers` are among those that SDP cuts.
# (The models of `dj.models` have both; `dj.models.logical_names` tells the names.)

# %%
LAYERS, EMBED, MLP = 8, 32, 64
NAMES = {
  "stem": ("inputs", "embed"),
  "blocks": {
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
  },
  "head": ("embed", "classes"),
}


def new(key, layers=LAYERS, embed=EMBED, mlp=MLP):
  stem, up, down = jax.random.split(key, 3)
  draw = lambda key, *shape: jax.random.normal(key, shape) / shape[-2] ** 0.5
  return {
    "stem": draw(stem, 64, embed),
    "blocks": {
      "up": draw(up, layers, embed, mlp),
      "down": draw(down, layers, mlp, embed) / layers**0.5,
    },
    "head": jnp.zeros((embed, 10)),
  }


def normal(x):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def logits(params, image):
  def block(x, w):
    return x + jax.nn.gelu(normal(x) @ w["up"]) @ w["down"], None

  x = image.reshape(image.shape[0], -1) @ params["stem"]
  x, _ = jax.lax.scan(block, x, params["blocks"])
  return normal(x) @ params["head"]


def cross_entropy(out, label):
  losses = optax.softmax_cross_entropy_with_integer_labels(out, label)
  return losses.mean()


def loss_fn(params, batch, key):
  return cross_entropy(logits(params, batch["image"]), batch["label"]), {}


params = new(jax.random.key(1))
tx = optax.adam(2e-3, eps=1e-6)
sdp = functools.partial(dj.sdp, loss_fn, tx, names=NAMES, shapes=params)

# %% [markdown]
# ## Who holds what
#
# Give every hidden unit and every layer its own number as its weights, and let
# each worker say what it got. `state.params` has what is shared by all, and what
# each worker holds, with a leading worker axis.


# %%
def held(axis, number, **options):
  """Who holds which units or layers: (workers, layers or 1, numbers), bool."""
  numbered = jnp.zeros_like(params["blocks"]["up"]) + number
  tree = {**params, "blocks": {**params["blocks"], "up": numbered}}
  run = dj.simulate(sdp(**options), workers=WORKERS)
  has = run.init(key, tree).params.held["blocks"]["up"]  # (w, l, e, m)
  has = has.max(axis=2) if axis == "mlp" else has.max(axis=(2, 3))[:, None]
  return np.asarray((has[..., None] == jnp.arange(number.size)).any(2))


units, layers = jnp.arange(MLP), jnp.arange(LAYERS)[:, None, None]
half = {"coverage": 0.5}
panels = {}
for assignment in ("cyclic", "shuffled"):
  who = held("mlp", units, **half, assignment=assignment)
  for layer in (0, 5):
    panels[f"hidden units, {assignment}, layer {layer}"] = who[:, layer]
panels["layers, cyclic"] = held("layers", layers, **half, level="block")[:, 0]

figure, axes = plt.subplots(1, 5, figsize=(13, 2.6), layout="constrained")
for ax, (title, who) in zip(axes, panels.items(), strict=True):
  groups = who.reshape(WORKERS, 8, -1)
  assert (groups.all(-1) == groups.any(-1)).all()  # of one fate
  ax.pcolormesh(groups.all(-1), cmap="Blues", edgecolors="white", vmax=1.4)
  ax.set_title(title, fontsize=8)
  ax.set_xlabel("group")
  ax.invert_yaxis()
axes[0].set_ylabel("worker")
plt.show()
for title, who in panels.items():
  print(
    f"{title:34} a worker holds {set(who.sum(1).tolist())}, "
    f"each has {set(who.sum(0).tolist())} holders"
  )

# %% [markdown]
# Workers and groups of units stand on one ring, and a worker holds the groups of a
# window that starts where it stands. So all hold equally much, everything has
# equally many holders, and no luck is involved. `cyclic` puts the windows at the
# same place in all layers; `shuffled` moves the workers about in each, so that two
# of them that have nothing in common in one layer share much in the next.
#
# ## A subnetwork's arrays are small
#
# Nothing is masked: a worker's `mlp` axis is as long as the units that it holds,
# its `layers` axis as long as its layers. So parameters, gradient, optimizer,
# products and activations all shrink.


# %%
METHODS = {"ddp": dj.ddp(loss_fn, tx)}
COVERAGE = {"1/2": 0.5, "1/4": 0.25}
for level in ("neuron", "block"):
  for name, coverage in COVERAGE.items():
    METHODS[f"{level} {name}"] = sdp(level=level, coverage=coverage)
runs = {
  name: dj.simulate(method, workers=WORKERS) for name, method in METHODS.items()
}


def subnetwork(name):
  """Shapes of what one worker trains."""
  if name == "ddp":
    return jax.eval_shape(lambda: params)
  run = runs[name]
  one = lambda state: run.method.member(lambda tree: tree, state)
  runner = dj.spmd.vmap_runner(run.method.axis, WORKERS)
  each = runner(one, (run.method.specs,), P(run.method.axis))
  stacked = jax.eval_shape(each, run.abstract(key, params))
  shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  return jax.tree.map(shape, stacked)


size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
print(f"{'':12} {'up':12} {'parameters':>10} {'bytes, Adam':>12} FLOPs a row")
for name in runs:
  part = subnetwork(name)
  count = size(part)
  # Four float32 a parameter: itself, its gradient, two moments. A multiply-add
  # in the forward pass is two operations, and four more in the backward pass.
  print(
    f"{name:12} {'x'.join(map(str, part['blocks']['up'].shape)):12} "
    f"{count:10,} {16 * count:12,} {6 * count:11,}"
  )

# %% [markdown]
# ## With a coverage of 1 it is DDP

# %%
data = dj.data.load("digits")
rows = dj.data.train_iterator(data.train, batch_size=BATCH, seed=0, threads=0)
batches = [next(rows) for _ in range(4 * STEPS)]
all_rows = next(
  dj.data.train_iterator(data.train, batch_size=1200, seed=0, threads=0)
)
test_rows = next(iter(dj.data.eval_batches(data.test, batch_size=400)))


def train(run, batches):
  """Yields (the whole model, state) after every step."""
  state = run.init(key, params)
  for batch in batches:
    state, _ = run.step(state, batch, key)
    yield run.params(state), state


def last(run, batches):
  for found in train(run, batches):  # noqa: B007
    pass
  return found


@jax.jit
def largest_difference(a, b):
  different = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), a, b)
  return jax.tree.reduce(jnp.maximum, different)


reference, _ = last(runs["ddp"], batches[:20])
for level in ("neuron", "block"):
  whole = dj.simulate(sdp(level=level, coverage=1.0), workers=WORKERS)
  model, _ = last(whole, batches[:20])
  apart = float(largest_difference(model, reference))
  print(f"{level} level, after 20 steps: {apart:.1e} apart from DDP")

# %% [markdown]
# ## Learning curves
#
# The loss of the whole model, put together, over the whole training part. An
# update at $C = 1/2$ costs about half, so it makes twice as many for as many
# operations, as the paper counts: on the left the updates, on the right the
# operations. (More updates also mean more passes over the data.)


# %%
@jax.jit
def loss_of(model):
  return loss_fn(model, all_rows, None)[0]


EVERY = 5
curves, states, models = {}, {}, {}
for name, run in runs.items():
  coverage = COVERAGE.get(name.split()[-1], 1.0)
  count, curves[name] = round(STEPS / coverage), []
  for step, (model, state) in enumerate(train(run, batches[:count]), 1):
    if step % EVERY == 0:
      curves[name].append(float(loss_of(model)))
    if step == STEPS:
      models[name], states[name] = model, jax.tree.map(jnp.copy, state)

COLOURS = {"ddp": "#000000", "1/2": "#0072b2", "1/4": "#d55e00"}
figure, axes = plt.subplots(
  2, 2, figsize=(10, 6.4), layout="constrained", sharey=True
)
for row, level in zip(axes, ("neuron", "block"), strict=True):
  for name in ("ddp", f"{level} 1/2", f"{level} 1/4"):
    updates = EVERY * np.arange(1, 1 + len(curves[name]))
    cost = size(subnetwork(name)) / size(params)
    how = {"color": COLOURS[name.split()[-1]], "label": name}
    first = updates <= STEPS
    row[0].plot(updates[first], np.array(curves[name])[first], **how)
    row[1].plot(updates * cost, curves[name], **how)
  for ax, label in zip(row, ("updates", "operations, in updates of DDP's")):
    ax.set(yscale="log", xlabel=label)
    ax.set_title(f"{level} level: training loss, nats", loc="left", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
plt.show()
for name, y in curves.items():
  print(
    f"{name:12} training loss after {STEPS} updates {y[STEPS // EVERY - 1]:.4f}"
    f", after {EVERY * len(y)} {y[-1]:.4f}"
  )

# %% [markdown]
# ## The whole against its parts
#
# Which model is meant? Each worker has trained its own; what is put together has
# never run in training. `method.member` gives each worker's own model to a
# function, here on the test images: the mean of the eight, and the ensemble of
# their probabilities, which is eight models.


# %%
def members(run, state):
  """(mean loss, mean accuracy, the ensemble's accuracy) over the workers."""
  axis, label = run.method.axis, test_rows["label"]

  def one(state):
    find = lambda model: logits(model, test_rows["image"])
    if run.method.member is None:
      out = find(run.method.params(state))
    else:
      out = run.method.member(find, state)
    together = jax.lax.pmean(jax.nn.softmax(out), axis)
    right = jax.lax.pmean(jnp.mean(out.argmax(-1) == label), axis)
    loss = jax.lax.pmean(cross_entropy(out, label), axis)
    return loss, right, jnp.mean(together.argmax(-1) == label)

  runner = dj.spmd.vmap_runner(axis, WORKERS)
  return map(float, jax.jit(runner(one, (run.method.specs,), P()))(state))


print(f"after {STEPS} updates: test loss (accuracy)")
for name, run in runs.items():
  mean, right, ensemble = members(run, states[name])
  out = logits(models[name], test_rows["image"])
  whole = float(cross_entropy(out, test_rows["label"]))
  hits = float(jnp.mean(out.argmax(-1) == test_rows["label"]))
  print(
    f"{name:12} whole {whole:.3f} ({hits:.3f})   mean of the workers "
    f"{mean:.3f} ({right:.3f})   ensemble ({ensemble:.3f})"
  )

# %% [markdown]
# At a coverage of 1/2 the whole is about as good as its parts. At 1/4 it falls
# behind them: four times as many units, or blocks, add to each sum as in any
# network that was trained. `rescale` makes up for that: `"train"` divides by the coverage what is summed over absent units, or what
# blocks write, while training; `"test"` multiplies the whole model's by it, as
# dropout once did. What the paper does is not known, so the default is `"none"`.
# At block level SDP has to be told which parameters a block writes with.

# %%
WRITERS = {
  "stem": False,
  "blocks": {"up": False, "down": True},
  "head": False,
}
scaled = {"none": models["block 1/4"]}
for rescale in ("train", "test"):
  method = sdp(level="block", coverage=0.25, rescale=rescale, writers=WRITERS)
  run = dj.simulate(method, workers=WORKERS)
  scaled[rescale], _ = last(run, batches[:STEPS])
for rescale, model in scaled.items():
  print(f"block 1/4, rescale={rescale:6} training loss {loss_of(model):.4f}")

# %% [markdown]
# ## What it costs: bytes, operations, memory
#
# For each worker and each part that it holds, gradients go to the part's owner and
# come back averaged. With $r = CN$ holders that is $(r - 1) / (N - 1)$ of the bytes
# of DDP's all-reduce, for what is cut; what is shared travels as ever.

# %%
for r in (1, 2, 4, 8):
  print(f"C = {r}/{WORKERS}: {(r - 1) / (WORKERS - 1):.3f} of DDP's bytes")

# %% [markdown]
# `dj.inspect.compile` runs the real compiler for a machine by name, which need not
# be there (the extra `distrain-jax[aot]`), and reads the program: what a device
# keeps, what its activations take, what it computes and what it sends. Here the
# same network, wider, with 8,192 rows a worker. No array is made, nothing runs.


# %%
wide = jax.eval_shape(lambda: new(key, embed=512, mlp=2048))
many = {
  "image": jax.ShapeDtypeStruct((8 * 8192, 64), jnp.float32),
  "label": jax.ShapeDtypeStruct((8 * 8192,), jnp.int32),
}
reports = {}
try:
  eight = dj.inspect.mesh("h100:8", {"data": -1})
  cut = functools.partial(dj.sdp, loss_fn, tx, names=NAMES, shapes=wide)
  for name, method in {
    "ddp": dj.ddp(loss_fn, tx),
    "fsdp": dj.fsdp(loss_fn, tx),
    "sdp 1/2": cut(coverage=0.5),
    "sdp 1/2, backward": cut(coverage=0.5, masking="backward"),
    "sdp 1/2, sharded": cut(coverage=0.5, shard_optimizer=True),
    "sdp 1/4": cut(coverage=0.25),
  }.items():
    run = dj.distribute(method, eight)
    report = dj.inspect.compile(run, run.abstract(key, wide), many, key)
    reports[name] = report
except ImportError as missing:  # says which package
  print(missing)
if reports:
  print(
    f"{'of DDP':18} {'state':>6} {'temporaries':>12} {'FLOPs':>6} {'sent':>6}"
  )
for name, report in reports.items():
  ddp = reports["ddp"]
  state = lambda x: sum(x.memory.state.values())
  print(
    f"{name:18} {state(report) / state(ddp):6.2f} "
    f"{report.memory.temporaries / ddp.memory.temporaries:12.2f} "
    f"{report.flops / ddp.flops:6.2f} {report.wire_bytes / ddp.wire_bytes:6.2f}"
  )

# %% [markdown]
# Read the first column plainly: with as many workers **FSDP keeps less**, 1/N of
# everything, where SDP keeps at least that of what it cuts, and all of what is
# shared. Whoever only wants a model to fit takes FSDP. What SDP gives instead is in
# the other columns: fewer operations, smaller activations and fewer bytes a step,
# which sharding does not give. The price: it is another training, of other models,
# and as the curves above show, an update at a small coverage is worth less.
#
# Backward masking shows where the savings come from: every worker runs the whole
# model, so it keeps all parameters and receives them, and only the optimizer and
# the backward products for the weights get smaller.
#
# ## On a TPU or on GPUs
#
# The method stays as it is; `dj.distribute` takes the place of `dj.simulate`. The
# next cell runs on whatever devices there are; one device is one worker, who holds
# everything.

# %%
mesh = dj.spmd.make_mesh({"data": -1})  # all devices in one axis
coverage = 0.5 if mesh.size % 2 == 0 else 1.0  # a multiple of 1 / workers
run = dj.distribute(sdp(level="block", coverage=coverage), mesh)
state = run.init(key, params)
for batch in batches[:5]:
  state, metrics = run.step(state, run.put(batch), key)
print(f"{run.workers} device(s): loss {metrics['loss']:.4f}")

# %% [markdown]
# What to change for a model that is worth it:
#
# * **Install** `distrain-jax[tpu]` or `distrain-jax[cuda]`; on Colab choose the
#   runtime first and restart it after the installation.
# * **`shard_optimizer=True`**: each part has one owner among its holders, who has
#   its optimizer's state, as by ZeRO-1. **`param_dtype="bfloat16"`**: what the loss
#   sees, with float32 masters; **`wire_dtype="bfloat16"`**: what gradients travel in.
# * **A number of layers and of heads that the workers divide** makes the windows of
#   one size in all of them.
# * **`blocks=dj.models.blocks(model, example)`** for residual blocks that differ, as
#   a ResNet's: each worker then runs a program of its own, without those that it has
#   not. `evaluation.recalibrate` estimates BatchNorm's statistics of the whole.
# * The trainer does it by itself: `python launch/train.py
#   --config=configs/sdp/text.py --workdir=runs/sdp`. `python launch/export.py
#   runs/sdp sdp.safetensors` writes the whole model, from which
#   `--config.initial_params=sdp.safetensors` starts any other split or method.
#
# ## To try
#
# * `assignment="shuffled"` in place of windows that are alike in all layers.
# * `coverage=0.125`: eight models that share only stem and head. How good is their
#   whole, and how good their ensemble?
# * A model as small as a subnetwork, trained by DDP: `new(key, mlp=32)`. It is what
#   the whole has to beat.
# * `level="both", coverage=(0.5, 0.5)`: half of the layers, and of each half of its
#   units.
