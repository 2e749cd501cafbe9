# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PETRA: stages that do not wait for each other
#
# A network too large for one device is cut into **stages**, one a device, and
# micro-batches pass through them: forward, and back. Back-propagation then asks
# for two things. A stage must keep what it computed on the way forward until the
# gradient comes back, and its parameters must not change in between. So pipelines
# fill, empty, update, and fill again.
#
# [PETRA](https://arxiv.org/abs/2406.02052) (Rivaud et al., 2024) gives up both. In
# every **tick** a micro-batch enters, and each stage takes one micro-batch forward
# and an older one back, with the parameters that it has *now*; then it updates
# them. Stages are **reversible**: they compute their input from their output, which
# comes back with the gradient, so that nothing is kept.
#
# | in one tick, stage $s$ of $J$ | |
# |---|---|
# | forward, a new micro-batch | $x_{s+1} = F_s(x_s;\ \theta_s)$, sent up |
# | back, one that passed $2(J - 1 - s)$ ticks ago | $\hat x_s = F_s^{-1}(\hat x_{s+1};\ \theta_s)$; the gradient is taken there, at the same $\theta_s$; $\hat x_s$ and its gradient are sent down |
# | update | of $\theta_s$, by every $k$-th gradient: the mean of the last $k$ |
#
# The price: $\theta_s$ has changed since the micro-batch passed forward. The gradient
# is late, and $\hat x_s$ is not quite the input that was. It is not the gradient of
# the loss, and below one sees what that costs.
#
# The baseline is the **synchronous pipeline** with the 1F1B schedule: the same
# stages, the exact gradient, and idle stages while it fills and empties.
#
# What follows runs on a laptop in less than a minute: four stages simulated on one
# device, with real data. The end says what to change on a TPU or GPU.

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
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, display

import distrain_jax as dj
from distrain_jax.inspect import ticks
from distrain_jax.inspect.stage_memory import stage_memory

STAGES, ROWS, MICRO_BATCHES = 4, 32, 400
key = jax.random.key(0)

# %% [markdown]
# ## A network as blocks
#
# A block is a pure function `(params, model_state, x, key) -> (y, model_state)`;
# your own model becomes a list of them. `params` is what it owns, in whatever form;
# `model_state` has running statistics such as BatchNorm's, `{}` here. (The models of
# `dj.models` that are such lists: `dj.models.parts`.)
#
# * `stages.plain`: any function. It will keep its inputs.
# * `stages.coupling`: two streams, $(x, r) \to (r + F(x),\ x)$, reversible whatever
#   the function $F$ is.
# * `stages.last`: the one that ends in the loss.

# %%
BLOCKS = 6


def new(key, width=32, hidden=64):
  stem, *blocks = jax.random.split(key, 1 + BLOCKS)

  def draw(key, *shape):
    return jax.random.normal(key, shape) / shape[0] ** 0.5

  def block(key):
    up, down = jax.random.split(key)
    return {"up": draw(up, width, hidden), "down": draw(down, hidden, width)}

  return {
    "stem": {"w": draw(stem, 64, 2 * width)},
    **{f"block_{i}": block(key) for i, key in enumerate(blocks)},
    "head": {"w": jnp.zeros((2 * width, 10))},
  }


def normal(x):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def stem(params, model_state, image, key):
  x = image.reshape(image.shape[0], -1) @ params["w"]
  return tuple(jnp.split(x, 2, axis=-1)), model_state  # two streams


def branch(params, model_state, x, key):  # F
  return jax.nn.gelu(normal(x) @ params["up"]) @ params["down"], model_state


def head(params, model_state, streams, targets, key):
  logits = normal(jnp.concatenate(streams, axis=-1)) @ params["w"]
  label = targets["label"]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  hits = (logits.argmax(-1) == label).mean(dtype=jnp.float32)
  return losses.mean(), ({"accuracy": hits}, model_state)


blocks = [
  dj.stages.plain("stem", stem),
  # One kind: they run the same code, which is compiled once.
  *(
    dj.stages.coupling(f"block_{i}", branch, kind="branch")
    for i in range(BLOCKS)
  ),
  dj.stages.last("head", head),
]
network = [blocks[i : i + 2] for i in range(0, len(blocks), 2)]  # two a stage

# %% [markdown]
# scikit-learn's digits, in micro-batches of 32. `check_inverses` sends random input
# forward and back through every block that says it is reversible, and raises for
# one that is not; what it returns is the error, relative to the input.

# %%
data = dj.data.load("digits")
rows = dj.data.train_iterator(data.train, batch_size=ROWS, seed=0, threads=0)
micro_batches = [next(rows) for _ in range(MICRO_BATCHES)]
train_rows = next(
  dj.data.train_iterator(data.train, batch_size=1200, seed=0, threads=0)
)
test_rows = next(iter(dj.data.eval_batches(data.test, batch_size=400)))
params = new(jax.random.key(1))
example = micro_batches[0]

errors = dj.stages.check_inverses(blocks, params, example["image"])
for name, error in errors.items():
  print(f"{name}: its input comes back to {error:.0e}")

# %% [markdown]
# ## Ticks
#
# `dj.petra` is told the stages, the shapes of the parameters and of a micro-batch.
# With `accumulate=1` a step is one tick. Stage $s$ has its first gradient
# $2(J - 1) - s$ ticks after the first micro-batch entered, and until then it changes
# nothing: no momentum, no weight decay.


# %%
def pipelined(factory, k, rate, **options):
  """A run of dj.petra or dj.pipeline; k micro-batches an update."""
  method = factory(
    network,
    optax.sgd(rate, momentum=0.9, nesterov=True),
    shapes=params,
    example=example,
    inputs="image",  # the batch's other keys are the loss's targets
    accumulate=k,
    **options,
  )
  return dj.simulate(method, workers=STAGES)


RATE = 0.02
runs = {
  (name, k, rate): pipelined(factory, k, rate)
  for k, rate in ((1, RATE), (4, RATE), (4, 4 * RATE))
  for name, factory in (("pipeline", dj.pipeline), ("petra", dj.petra))
}
run = runs["petra", 1, RATE]
state = run.init(key, params)
print("tick   gradients seen by stages 0 to 3   busy   loss")
for tick in range(10):
  state, metrics = run.step(state, micro_batches[tick], key)
  print(
    f"{tick:4}   {state.counted.tolist()!s:31}   {metrics['busy']:.2f}"
    f"   {metrics['loss']:.3f}"
  )

# %% [markdown]
# `busy` is the fraction of all stages' passes, forward and back, that had a
# micro-batch: all of them from tick 6 on. `loss` is that of the micro-batch that
# reached the last stage in this tick, 0 before the first.
#
# `run.params` is the whole network, as its stages are now; micro-batches are still
# on their way. `run.drain` takes them back without letting new ones in, at the end
# of a run or before an epoch's last evaluation. A checkpoint need not: all that is
# in flight is part of the state.

# %%
drained = run.drain(state, key)
print(f"entered                     {int(drained.entered)}")
print(f"gradients, before the drain {state.counted.tolist()}")
print(f"after it                    {drained.counted.tolist()}")

# %% [markdown]
# ## Beside the synchronous pipeline
#
# `dj.pipeline` takes the same stages. Its gradient is exact, that of all of a step's
# micro-batches at the same parameters: here against `jax.grad` of the whole network,
# which `stages.loss_fn` makes of the blocks for any method, and for evaluation.

# %%
loss_fn = dj.stages.loss_fn(blocks, inputs="image")


@jax.jit
def evaluate(params, batch):
  """(loss in nats, accuracy), means over the rows."""
  loss, (aux, _) = loss_fn(params, {}, batch, key)
  return loss, aux["accuracy"]


def batch_of(start, k):
  """k micro-batches, for one step."""
  some = micro_batches[start : start + k]
  return jax.tree.map(lambda *x: np.concatenate(x), *some)


run = runs["pipeline", 4, RATE]
state, _ = run.step(run.init(key, params), batch_of(0, 4), key)
grads = jax.jit(jax.grad(lambda p: evaluate(p, batch_of(0, 4))[0]))(params)
tx = optax.sgd(RATE, momentum=0.9, nesterov=True)
updates, _ = tx.update(grads, tx.init(params))
differences = jax.tree.map(
  lambda x, y: float(jnp.abs(x - y).max()),
  run.params(state),
  optax.apply_updates(params, updates),
)
apart = max(jax.tree.leaves(differences))
print(f"one update of the pipeline: {apart:.0e} apart from back-propagation's")

# %% [markdown]
# Both methods see the same 400 micro-batches and make as many updates: 400 with
# $k = 1$, 100 with $k = 4$. Between a micro-batch's two passes stage 0 updates 6 times
# with $k = 1$, and 6/4 times with $k = 4$. The paper raises the rate with $k$, by the
# usual linear rule; so $k = 4$ is here twice, once with the rate of $k = 1$.


# %%
def train(run, k):
  """(training losses, every 8 micro-batches; final params)."""
  state, losses = run.init(key, params), []
  for start in range(0, MICRO_BATCHES, k):
    state, _ = run.step(state, batch_of(start, k), key)
    if (start + k) % 8 == 0:
      losses.append(evaluate(run.params(state), train_rows)[0])
  if run.drain is not None:
    state = run.drain(state, key)
  return losses, run.params(state)


curves, models = {}, {}
for name, run in runs.items():
  curves[name], models[name] = train(run, name[1])

# %%
COLOURS = {"pipeline": "#000000", "petra": "#d55e00"}
settings = dict.fromkeys(name[1:] for name in runs)
figure, panels = plt.subplots(
  1, len(settings), figsize=(11, 3.6), sharey=True, layout="constrained"
)
for axes, (k, rate) in zip(panels, settings, strict=True):
  for method, colour in COLOURS.items():
    y = curves[method, k, rate]
    x = 8 * np.arange(1, len(y) + 1)
    axes.plot(x, y, color=colour, label=method, lw=1.6)
  axes.set_yscale("log")
  axes.set_title(f"k = {k}, rate {rate:g}", loc="left", fontsize=10)
  axes.set_xlabel("micro-batches")
  axes.grid(alpha=0.3)
panels[0].set_ylabel("training loss, nats")
panels[0].legend(frameon=False)
plt.show()
for (method, k, rate), model in models.items():
  loss, _ = evaluate(model, train_rows)
  _, right = evaluate(model, test_rows)
  print(
    f"{method:8} k = {k}, rate {rate:g}:  training loss {loss:.4f}   "
    f"test accuracy {right:.3f}"
  )

# %% [markdown]
# Look at the loss; 400 test images tell differences of a per cent at best. PETRA
# learns, and at equal updates it is behind the exact gradient. The three pictures
# agree on why: what counts is how far the parameters move between a micro-batch's two
# passes, the number of updates times the rate. With $k = 4$ and the same rate that is a
# fourth, and the curves nearly meet. Raising the rate by 4 as well gives it all back:
# both learn faster, and the gap is as wide as that of $k = 1$. Early on, where
# parameters move most, the loss even rises for a while; the paper's runs start with
# five epochs of warm-up. This toy is hard on PETRA: a network that learns in a hundred
# updates is all early training. And it is one seed and one optimizer.
#
# ## What a stage does when
#
# `ticks.trace` makes a step of the real method and reads from it which micro-batch
# each stage had in each tick. Time is a model: all stages cost the same, a pass
# forward 1, back 2, and going forward once more, to reconstruct, 1. The pipeline
# counts as one that keeps what its backward pass reads (`buffer="graph"`; its schedule
# is the same with any), and so computes nothing twice.

# %%
petra = pipelined(dj.petra, 10, RATE)  # ten ticks a step
pipeline = runs["pipeline", 4, RATE]
again, once = ticks.Costs(), ticks.Costs(again=0)
traces = {}
for name, run, k in (("petra", petra, 10), ("pipeline", pipeline, 4)):
  start = run.init(key, params)
  traces[name] = ticks.trace(run, start, batch_of(0, k), key)
path = Path(tempfile.mkdtemp()) / "ticks.png"
ticks.picture(
  [
    ("PETRA: updates in every tick; it goes on so", traces["petra"], again),
    ("1F1B: one step of M = 4 micro-batches", traces["pipeline"], once),
  ],
  path,
  title="four stages; numbers are micro-batches, dots end ticks",
)
display(Image(path, width=1000))
full = ticks.when_full(traces["petra"])
steady = float(ticks.tick_times(full, again).mean())
synchronous = ticks.time_per_micro_batch(traces["pipeline"], once)
for name, time, busy in (
  ("petra, once full", steady, ticks.busy_time(full, again)),
  ("pipeline, M = 4", synchronous, ticks.busy_time(traces["pipeline"], once)),
):
  print(f"{name:16} {time:.2f} per micro-batch, {100 * busy:.0f} % busy")

# %% [markdown]
# A synchronous step takes $3(1 + (J - 1)/M)$ per micro-batch, PETRA 4, for going
# forward twice (all but the last stage, which needs not). So by this model PETRA is the
# faster one for $M < 3(J - 1)$, 9 here, and with more micro-batches a step **the
# synchronous pipeline is faster**, if it has the memory to keep its graphs.
# `launch/pipeline_schedule.py` has GPipe and recomputation too.
#
# ## Memory
#
# `stage_memory` says what each stage would hold; nothing is computed, and shapes will
# do for parameters. Here the same network, wider, with micro-batches of 4,096 rows,
# and twice more: with one block that is not reversible (as those are that halve a
# ResNet's resolution), and with none that is. `buffer` is what a stage keeps between a
# micro-batch's passes: `"none"` is PETRA, `"input"` keeps all blocks' inputs, and
# `"input_params"` also the parameters, PipeDream's way.


# %%
def plainly(block):
  """The same function, not declared reversible."""
  return dj.stages.plain(block.name, block.forward, kind="plain")


def with_plain(names):
  return [[plainly(b) if b.name in names else b for b in s] for s in network]


wide = jax.eval_shape(lambda: new(key, width=1024, hidden=1024))
many = {
  "image": jax.ShapeDtypeStruct((4096, 8, 8, 1), jnp.float32),
  "label": jax.ShapeDtypeStruct((4096,), jnp.int32),
}
measure = functools.partial(
  stage_memory, shapes=wide, example=many, inputs="image"
)
memories = {
  "reversible": measure(network),
  "block_2 is not": measure(with_plain({"block_2"})),
  "none is": measure(with_plain(set(errors))),
}
print(
  "MB: kept on stages 0 to 3, room for it on each device, all that it holds"
)
for name, found in memories.items():
  for buffer in ("none", "input", "input_params"):
    each = found.buffers[buffer]
    fifo = " ".join(f"{stage.used['fifo'] / 1e6:6.0f}" for stage in each)
    first = each[0]
    room = (first.used["fifo"] + first.padding["fifo"]) / 1e6
    total = sum(map(sum, (first.used.values(), first.padding.values()))) / 1e6
    print(f"{name:18} {buffer:12} {fifo}    {room:6.0f}   {total:6.0f}")

# %% [markdown]
# Read it plainly.
#
# * **Where PETRA saves**: a chain of reversible blocks keeps nothing. There is left
#   what enters the first stage, whose input no one sends back, and what is between
#   two stages.
# * **Where it does not**: a block that is not reversible keeps a queue of its inputs,
#   $2(J - 1 - s)$ micro-batches long, whatever `buffer` is; in a ResNet those are most
#   of what is left. Where no block is reversible, PETRA holds what `"input"` holds.
# * **All devices run one program**, and each has room for the longest of the queues:
#   stage 1 alone has one for `block_2`, four micro-batches long, and all four devices
#   have room for it. One such block costs as much as one on each later stage.
# * **Not in the table**: the optimizer (`stage_memory(tx=...)` adds it), and what a
#   pass needs while it runs, for one micro-batch and one block at a time.
#
# The synchronous pipeline can be reversible too: `dj.pipeline(..., buffer="none")`
# keeps as little, and its gradient is exact, since parameters stand still. It goes
# forward twice as PETRA does and fills and empties in every step: $4(1 + (J - 1)/M)$
# per micro-batch. What PETRA has over it is that $(J - 1)/M$.
# `print(memories["block_2 is not"])` adds the paper's own formula.
#
# ## On a TPU or on GPUs
#
# The method stays as it is; `dj.distribute` takes the place of `dj.simulate`, on a mesh
# with an axis `stage` and beside it one of pipelines that work side by side
# (`replicas`), among which a batch's rows are divided. The next cell runs on whatever
# devices there are; where four do not divide them, one stage holds all blocks.

# %%
deep = jax.device_count() % STAGES == 0
mesh = dj.spmd.make_mesh({"stage": STAGES if deep else 1, "data": -1})
method = dj.petra(
  network if deep else [blocks],
  optax.sgd(RATE, momentum=0.9, nesterov=True),
  shapes=params,
  example=example,  # a micro-batch of one pipeline
  inputs="image",
  replicas="data",
)
run = dj.distribute(method, mesh)
state = run.init(key, params)
beside = mesh.shape["data"]
for step in range(12):
  state, metrics = run.step(
    state, run.put(batch_of(step * beside, beside)), key
  )
print(
  f"{beside} pipeline(s) of {run.workers} stage(s), {jax.device_count()} "
  f"device(s): loss {metrics['loss']:.4f}, busy {metrics['busy']:.2f}"
)

# %% [markdown]
# What to change for a model that is worth it:
#
# * **Install** `distrain-jax[tpu]` or `distrain-jax[cuda]`; on Colab choose the
#   runtime first and restart it after the installation.
# * **As many stages as devices in the axis `stage`**, next to each other in the
#   network and equal in cost: a tick takes as long as the slowest one.
# * **`accumulate`**: fewer updates between a micro-batch's passes. Raise the rate
#   with care, and start with a warm-up.
# * **Streams in float32**, whatever $F$ is computed in: going back subtracts what
#   was added. `stages.coupling(grid=2**-12)` makes reconstruction exact where
#   parameters stand still; `wire_dtype="bfloat16"` sends half the bytes and makes the
#   estimates worse.
# * **`buffer="input"`, `"params"`, ...** tell which approximation hurts: of the input,
#   or of the parameters. **`delay_exponent`** makes early stages' updates smaller;
#   **`predict=1.0`** lets forward passes have the parameters that they will meet.
# * **`dj.models.parts.blocks(model, measure)`** makes the blocks of `rev_mlp`,
#   `rev_vit`, `rev_llama` and the RevNets.
# * The trainer does it by itself: `python launch/train.py
#   --config=configs/petra/digits.py --workdir=runs/petra --devices=4`;
#   `--config.method.name=pipeline` trains the same stages synchronously.
#
# ## To try
#
# * A block that is not what it says: `stages.reversible("block_2", fn, inverse)` with
#   a wrong inverse. `check_inverses` raises; what would training do?
# * `RATE = 0.005`: how much of the gap at $k = 1$ is left?
# * `optax.adam(1e-3)` in place of SGD.
# * One block a stage: eight stages, and delays of up to 14 ticks.
