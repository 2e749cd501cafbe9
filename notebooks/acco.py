# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ACCO: accumulate while you communicate
#
# Data-parallel workers spend part of every step on the wire: gradients go out,
# parameters come back, and nobody computes. [ACCO](https://arxiv.org/abs/2406.02613)
# (Nabli et al., 2024) puts the wire beside the micro-batches of gradient
# accumulation. The difficulty: a gradient that is taken while the last one is
# still on its way does not know the parameters that it will be applied to. It is
# a step late. ACCO's answer is to look ahead, with half of the batch.
#
# **Who holds what.** As in ZeRO-1: every worker has the whole model to compute
# with, and 1/N of the master parameters and of the optimizer's state.
#
# **A round has two halves.** In each, communication and computation run side by
# side and share no data. $g$ and $\tilde g$ are gradients of half a batch each,
# averaged over all workers; $\theta$ are the parameters, $\tilde\theta$ is an
# estimate of the next ones.
#
# | half | on the wire, and each worker's 1/N of the update | meanwhile, each worker's micro-batches |
# |---|---|---|
# | estimate | $\tilde\theta_{t+1} = \mathrm{Opt}(\theta_t,\ \tilde g_t)$; only the parameters are kept | $g_t$ at $\theta_t$ |
# | commit | $\theta_{t+1} = \mathrm{Opt}(\theta_t,\ \mathrm{mean\ of\ } g_t \mathrm{\ and\ } \tilde g_t)$ | $\tilde g_{t+1}$ at $\tilde\theta_{t+1}$ |
#
# So an update is made of a whole batch, half of it taken at the parameters
# themselves and half at an estimate that half a batch has made. Nothing waits;
# the price is a second exchange: twice the bytes of ZeRO-1 in an update.
#
# The baselines here:
#
# * **DDP** and **ZeRO-1** wait for the wire; the same numbers, sharded or not.
# * **DPU** (delayed parameter updates) hides one exchange behind the next batch
#   and applies every gradient one update late.
# * **WP** (weight prediction) is DPU whose gradients are taken one predicted step
#   ahead: along the latest gradient that has come in, once more.
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
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, display

import distrain_jax as dj
from distrain_jax.inspect import clock, picture
from distrain_jax.inspect.clock import picture as clock_picture

WORKERS, BATCH, STEPS = 8, 256, 120
key = jax.random.key(0)

# %% [markdown]
# ## Data, a model, and the methods
#
# scikit-learn's digits (1,200 of them to train on) and a small MLP. A loss is
# `(params, batch, key) -> (loss, aux)`; any function of that form will do.

# %%
data = dj.data.load("digits")
rows = dj.data.train_iterator(data.train, batch_size=BATCH, seed=0, threads=0)
batches = [next(rows) for _ in range(STEPS)]
all_rows = next(
  dj.data.train_iterator(data.train, batch_size=1200, seed=0, threads=0)
)
test_rows = next(iter(dj.data.eval_batches(data.test, batch_size=400)))

model = dj.models.create("mlp", widths=(128, 128))
task = dj.models.task(model, "classification", batches[0])
params = task.init(jax.random.key(1)).params


@jax.jit
def loss_of(params):
  """Over the whole training part, in nats."""
  sums = task.evaluate(params, all_rows)
  return sums["loss_sum"] / sums["weight"]


@jax.jit
def accuracy_of(params):
  sums = task.evaluate(params, test_rows)
  return sums["correct_sum"] / sums["weight"]


# %% [markdown]
# Every method sees the same batches, and cuts each worker's 32 rows into two
# micro-batches: `accumulate=2`, and for ACCO `accumulate=1`, which counts a half.
# All send float32 here, so that what differs is the method and not rounding; on a
# real machine leave `wire_dtype` at ACCO's default, bfloat16.

# %%
# Adam divides by the size of a gradient: with its usual eps of 1e-8 even that
# of rounding errors, which would be all that some comparisons below show.
tx = optax.adam(3e-3, eps=1e-6)
float32 = {"wire_dtype": None}  # the parameters' own
methods = {
  "ddp": dj.ddp(task.loss_fn, tx, accumulate=2),
  "zero1": dj.zero1(task.loss_fn, tx, accumulate=2),
  "acco": dj.acco(task.loss_fn, tx, accumulate=1, **float32),
  "dpu": dj.dpu(task.loss_fn, tx, accumulate=2, **float32),
  "weight_prediction": dj.weight_prediction(
    task.loss_fn, tx, accumulate=2, **float32
  ),
}
runs = {
  name: dj.simulate(method, workers=WORKERS) for name, method in methods.items()
}


def train(run, batches):
  """Yields (theta, state) after every step; use both before the next one."""
  state = run.init(key, params)
  for batch in batches:
    state, _ = run.step(state, batch, key)
    # Commits what is pending: after t steps, theta of t updates in all methods.
    yield run.params(state), state


# %% [markdown]
# ## Learning curves
#
# `state` also says where the next gradient will be taken: `estimate` is ACCO's
# $\tilde\theta$, `point` is DPU's parameters or WP's prediction. We keep how far
# that is from the parameters that the gradient will be applied to.

# %%
POINT = {
  "acco": lambda state: state.estimate,
  "dpu": lambda state: state.point,
  "weight_prediction": lambda state: state.point,
}


@jax.jit
def distance(a, b):
  return optax.global_norm(jax.tree.map(jnp.subtract, a, b))


losses = {name: [] for name in runs}
gaps = {name: [] for name in POINT}
moves = []  # the length of DDP's updates
accuracy = {}
for name, run in runs.items():
  before = params
  for theta, state in train(run, batches):
    losses[name].append(loss_of(theta))
    if name in POINT:
      gaps[name].append(distance(POINT[name](state), theta))
    if name == "ddp":
      moves.append(distance(theta, before))
      before = theta
  accuracy[name] = float(accuracy_of(theta))

# %%
COLOURS = {
  "ddp": "#000000",
  "zero1": "#8a8a8a",
  "acco": "#d55e00",
  "dpu": "#0072b2",
  "weight_prediction": "#56b4e9",
}
DASHES = {"zero1": (0, (5, 3)), "acco": (0, (2, 2))}


def plot(axes, curves, title):
  for name, y in curves.items():
    how = {"color": COLOURS[name], "ls": DASHES.get(name, "-")}
    axes.plot(np.arange(1, len(y) + 1), y, label=name, lw=1.8, **how)
  axes.set_yscale("log")
  axes.set_title(title, loc="left", fontsize=10)
  axes.set_xlabel("updates")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)


figure, (left, right) = plt.subplots(
  1, 2, figsize=(11, 4), layout="constrained"
)
plot(left, losses, "training loss, nats")
plot(right, {n: y[:30] for n, y in losses.items()}, "the first 30 updates")
plt.show()
for name in runs:
  print(
    f"{name:18} training loss {losses[name][-1]:.5f}"
    f"   test accuracy {accuracy[name]:.3f}"
  )

# %% [markdown]
# Look at the loss: 400 test images tell differences of a per cent at best. ACCO
# lies on DDP's curve, and weight prediction close to it. DPU oscillates: each of
# its steps answers parameters that another step has since moved.
#
# ## The estimate
#
# How far from the parameters each method looks. DPU's distance is a whole update.
# ACCO's is what half a batch disagrees with the other half about: for SGD exactly
# $\tilde\theta - \theta = \tfrac{\eta}{2}(g - \tilde g)$, noise that a larger
# batch makes smaller and not a delay.

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
plot(axes, gaps, "distance: where the gradient is taken, where it is applied")
axes.plot(
  np.arange(1, STEPS + 1), moves, ":", color="black", label="a DDP update"
)
axes.legend(frameon=False)
plt.show()
update = float(np.mean(moves))
for name, gap in gaps.items():
  print(f"{name:18} {float(np.mean(gap)) / update:.2f} of DDP's mean update")

# %% [markdown]
# ## If both halves agree, ACCO is DDP
#
# Give both halves the same rows. Then $\tilde g = g$ while
# $\tilde\theta = \theta$, the estimate is exact, and so it stays: ACCO equals
# DDP for any optimizer. ZeRO-1, which is DDP by construction, shows what rounding
# alone does. DPU and WP still apply every gradient a step late.


# %%
def equal_halves(batch):
  """The first half of each worker's rows, twice."""

  def one(x):
    halves = x.reshape(WORKERS, 2, -1, *x.shape[1:])
    return halves[:, [0, 0]].reshape(x.shape)

  return jax.tree.map(one, batch)


@jax.jit
def largest_difference(a, b):
  different = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), a, b)
  return jax.tree.reduce(jnp.maximum, different)


twins = [equal_halves(batch) for batch in batches[:60]]
reference = [theta for theta, _ in train(runs["ddp"], twins)]
apart = {
  name: [
    largest_difference(theta, wanted)
    for (theta, _), wanted in zip(train(run, twins), reference, strict=True)
  ]
  for name, run in runs.items()
  if name != "ddp"
}
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
plot(axes, apart, "largest difference of a parameter from DDP's")
plt.show()
for name, differences in apart.items():
  print(f"{name:18} {max(map(float, differences)):.1e}")

# %% [markdown]
# ## Workers that are not equal
#
# A worker that is slow, or whose neighbours are, may contribute fewer
# micro-batches: `dj.Counted(batch, counts)` with `counts[w, half]`. The mean is
# over the micro-batches that were taken, not a mean of means, and what a worker
# skips is not looked at: below, worker 7's skipped rows are noise in one run.

# %%
uneven = dj.simulate(
  dj.acco(task.loss_fn, tx, accumulate=4, **float32), workers=WORKERS
)
counts = np.full((WORKERS, 2), 4)
counts[7] = 1  # of the four micro-batches in each half


def spoil(batch):
  """Noise in the images of worker 7's last three micro-batches of each half."""
  image = batch["image"].reshape(WORKERS, 2, 4, -1, *batch["image"].shape[1:])
  image = image.copy()
  image[7, :, 1:] = np.random.default_rng(0).normal(size=image[7, :, 1:].shape)
  return {**batch, "image": image.reshape(batch["image"].shape)}


def last(run, batches):
  for theta, _ in train(run, batches):  # noqa: B007
    pass
  return theta


slow = [dj.Counted(batch, counts) for batch in batches[:60]]
noise = [dj.Counted(spoil(batch), counts) for batch in batches[:60]]
theta, other = last(uneven, slow), last(uneven, noise)
print(f"training loss after 60 updates {loss_of(theta):.5f}")
print(f"with all micro-batches         {losses['acco'][59]:.5f}")
print(f"difference that noise makes    {largest_difference(theta, other):.1e}")
print(
  "weight of a worker's data: "
  f"fast {4 / counts[:, 0].sum():.3f}, slow {1 / counts[:, 0].sum():.3f}"
)

# %% [markdown]
# ## What hiding can buy
#
# Let $T_c$ be the compute of an update's whole batch and $T_m$ a reduce-scatter,
# the update and an all-gather. ZeRO-1 needs $T_c + T_m$. DPU needs
# $\max(T_c, T_m)$ and ACCO, which communicates twice, $\max(T_c, 2 T_m)$. At equal
# precision and batch ACCO is therefore **at most 1.5 times as fast** as ZeRO-1,
# where $T_m = T_c / 2$, and **slower where $T_m > T_c$**. Larger published gains
# come from fewer bytes or from a larger batch.
#
# `dj.inspect.clock` simulates the workers' streams from seconds that you give;
# `launch/simulate_clock.py` does so from the command line, for more methods.

# %%
folder = Path(tempfile.mkdtemp())
equal = clock.times(4, micro_batch=0.1, reduce_scatter=0.1, all_gather=0.1)
ratios = [2 ** (i / 2) for i in range(-8, 7)]
sweep = {
  name: [clock.simulate(name, equal.at_ratio(r, 4), updates=8) for r in ratios]
  for name in ("zero1", "ddp_buckets", "acco", "acco_adaptive", "dpu")
}
clock_picture.ratio(
  sweep, ratios, 0.4, folder / "ratio.png", title="four workers"
)
display(Image(folder / "ratio.png", width=1000))
for r, zero1, acco in zip(ratios, sweep["zero1"], sweep["acco"], strict=True):
  gain = zero1.update_seconds / acco.update_seconds
  print(f"Tm / Tc = {r:6.4f}: acco is {gain:.2f} times as fast as zero1")

# %% [markdown]
# Where one worker is slow, the loop of ACCO's paper goes on accumulating while it
# waits. That makes more gradients a second, of a larger batch, but not more
# updates; and a fast worker's data weigh more.

# %%
slow_worker = clock.times(
  4, micro_batch=0.1, reduce_scatter=0.1, all_gather=0.1, slow={0: 4}
)
shown = [
  (name, clock.simulate(name, slow_worker, updates=8))
  for name in ("zero1", "acco", "acco_adaptive")
]
clock_picture.gantt(
  [("worker 0 takes four times as long", shown, 5.0)], folder / "gantt.png"
)
display(Image(folder / "gantt.png", width=800))
for name, outcome in shown:
  print(
    f"{name:14} {outcome.updates_per_second:.2f} updates/s, "
    f"{outcome.micro_batches_per_second:5.1f} micro-batches/s, weights "
    f"{min(outcome.weights):.2f} to {max(outcome.weights):.2f}"
  )

# %% [markdown]
# ## On a TPU or on GPUs
#
# The method stays as it is; `dj.distribute` takes the place of `dj.simulate`. The
# next cell runs on whatever devices there are.

# %%
mesh = dj.spmd.make_mesh({"data": -1})  # all devices in one axis
run = dj.distribute(dj.acco(task.loss_fn, tx, accumulate=1), mesh)
state = run.init(key, params)
for batch in batches[:5]:
  state, metrics = run.step(state, run.put(batch), key)
print(f"{run.workers} device(s): loss {metrics['loss']:.4f}")

# %% [markdown]
# What to change for a model that is worth it:
#
# * **Install** `distrain-jax[tpu]` or `distrain-jax[cuda]`; on Colab choose the
#   runtime first and restart it after the installation.
# * **`param_dtype="bfloat16"`**: what the loss sees and what is gathered; masters
#   stay float32. **`wire_dtype="bfloat16"`** (the default): what gradients travel
#   in. Together 6 + 14/N bytes a parameter with Adam, gradients included.
# * **`accumulate`** is what communication hides behind: 4 or more in each half.
#   Each collective is cut into **`slices`** (default `accumulate // 2`), one
#   message a micro-batch. With `accumulate=1` nothing is hidden.
# * **`estimate_dtype="int8"`** sends the estimate in 8 bits: only the points where
#   gradients are taken depend on it.
# * `warmup=100` starts with synchronous steps, which equal DDP's.
# * The global batch is `workers * 2 * accumulate *` the rows of a micro-batch.
#
# ## Seeing the overlap, on hardware that you do not have
#
# `dj.inspect.compile` runs the real compiler for a machine by name (`"h100:8"`,
# `"v5e:2x4"`, `"v6e:4x4"`; the extra `distrain-jax[aot]`) and reads the schedule:
# which collectives are asynchronous, and what computes beside them. Here: a
# stack of eight 2048 x 2048 layers. No array is made, nothing runs. Times are a
# model's, each instruction at the chip's published peaks.


# %%
def stack_loss(params, batch, key):
  def layer(x, w):
    return x + jnp.tanh(x @ w), None

  x, _ = jax.lax.scan(layer, batch["x"].astype(jnp.bfloat16), params)
  return jnp.mean((x.astype(jnp.float32) - batch["y"]) ** 2), {}


stack = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.float32)
wide = jax.ShapeDtypeStruct((8 * 8 * 1024, 2048), jnp.float32)
half = {"param_dtype": "bfloat16", "wire_dtype": "bfloat16"}
reports = {}
try:
  eight = dj.inspect.mesh("h100:8", {"data": -1})
  for method in (
    dj.zero1(stack_loss, optax.adamw(1e-3), accumulate=8, **half),
    dj.acco(stack_loss, optax.adamw(1e-3), accumulate=4, **half),
  ):
    run = dj.distribute(method, eight)
    arguments = run.abstract(key, stack), {"x": wide, "y": wide}, key
    reports[method.name] = dj.inspect.compile(run, *arguments)
except ImportError as missing:  # says which package
  print(missing)
for name, report in reports.items():
  print(
    f"{name:6} a step {1e3 * report.step.seconds:.2f} ms; on the wire "
    f"{1e3 * report.communication_seconds:.2f} ms, of which exposed "
    f"{1e3 * report.exposed_seconds:.2f} ms"
  )

# %%
if reports:
  title = "One step on eight H100, as compiled"
  display(picture.figure(list(reports.values()), title=title))

# %% [markdown]
# ZeRO-1 waits for the wire (black below a bar); ACCO sends twice as much and does
# not wait. That alone makes no step shorter: this toy's wire is a twentieth of its
# step, and ACCO's second update and its slices, all memory traffic, cost more than
# that. The clock above leaves them out; compile your own model before you choose.
#
# `print(reports["acco"])` lists every collective with its bytes and what is beside
# it. For a config of your own:
# `python launch/compile.py --config=... --topology=v6e:2x4 --compare=zero1,acco`.
#
# ## To try
#
# * `optax.sgd` in place of Adam, at rising rates: on a quadratic loss DPU becomes
#   unstable at half of what ACCO and DDP bear.
# * Batches of 64 rows: the halves disagree more, and $\tilde\theta$ is further off.
# * `warmup=20` for `dj.dpu`: synchronous steps where the parameters move most.
# * Your own model: anything that gives `(params, batch, key) -> (loss, aux)`.
