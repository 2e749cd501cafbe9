# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # WASH: an ensemble that becomes one model
#
# Several networks that were trained apart, an **ensemble**, predict better
# together than each alone; but N networks cost N times as much to run. Their
# **average**, one network, costs no more than one, and for networks that
# started apart it is of no use: units that do the same stand at different
# places, and the mean of two unlike units is neither.
#
# [WASH](https://arxiv.org/abs/2405.17517) (Fournier et al., 2024) trains
# members that may be averaged at the end. Each trains alone; after every step a
# few weights, chosen at random, are **shuffled** among the members: the weight
# at one place goes from each member to another one.
#
# | | after a step | members |
# |---|---|---|
# | ensemble | nothing | stay apart |
# | WASH | a few weights are permuted | stay apart, and can be averaged |
# | [SPARTA](https://openreview.net/forum?id=stFPf3gzq1) | a few weights are averaged | come together |
# | [PAPA](https://arxiv.org/abs/2304.03094) | every 10 steps all weights move towards their average | stay near it |
#
# In all of them every member has the whole model and its own optimizer.
#
# What follows runs on a laptop in less than a minute: four members simulated on
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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import distrain_jax as dj
from distrain_jax import soups
from distrain_jax.soups import picture

MEMBERS, ROWS, STEPS, RATE = 4, 16, 1200, 0.02
key = jax.random.key(0)

# %% [markdown]
# ## What a shuffle does
#
# Four members with 40 weights each, which do not learn. Each weight has its
# first owner's colour; a step shuffles a fifth of the places.


# %%
def still(params, batch, key):
  return 0.0 * params["w"].sum(), {}


owner = {"w": jnp.tile(jnp.arange(float(MEMBERS))[:, None], (1, 40))}
run = dj.simulate(dj.wash(still, optax.sgd(0.0), rate=0.2), workers=MEMBERS)
state = run.init(key, owner, per_worker=True)
seen = {0: owner["w"]}
for step in range(1, 21):
  state, _ = run.step(state, {"x": jnp.zeros(MEMBERS)}, key)
  if step in (1, 5, 20):
    seen[step] = jnp.copy(state.params["w"])

figure, axes = plt.subplots(4, 1, figsize=(9, 5), layout="constrained")
for ax, (step, w) in zip(axes, seen.items(), strict=True):
  ax.pcolormesh(w, cmap="Set2", vmin=0, vmax=7, edgecolors="white")
  ax.set_title(f"after {step} steps", loc="left", fontsize=9)
  ax.set(yticks=np.arange(MEMBERS) + 0.5, yticklabels=range(MEMBERS))
  ax.invert_yaxis()
axes[1].set_ylabel("member")
axes[-1].set_xlabel("weight")
plt.show()
for step, w in seen.items():
  apart = soups.consensus_distance(soups.unstack({"w": w})).total.squared
  unmoved = float(jnp.mean(w == owner["w"]))
  print(
    f"after {step:2} steps: {unmoved:4.0%} where they were, average "
    f"{set(w.mean(0).tolist())}, squared distance from it {apart:.1f}"
  )

# %% [markdown]
# **Neither the average nor the members' distance from it changes.** What is
#   lost is who is who: after some shuffles a member is a random mixture of all,
#   so that it can only work if mixtures do, and learning sees to that. An
#   average is such a mixture.
#
# ## Data, models, and the methods
#
# scikit-learn's digits (1,200 of them to train on), each member with an order
# of its own, and four MLPs that start from different weights. A step shuffles
# `rate` of the first layer's weights, half of that of the second layer's and
# none of the last one's; `dj.models.depths` says which layer a weight belongs
# to.


# %%
data = dj.data.load("digits")


def rows_of(members):
  """Endless batches: each member's rows, one member after the other."""
  return dj.data.train_iterator(
    data.train,
    batch_size=ROWS * len(members),
    seed=0,
    members=members,
    threads=0,
  )


rows = rows_of(range(MEMBERS))
batches = [next(rows) for _ in range(STEPS)]
whole = lambda split: next(
  iter(dj.data.eval_batches(split, batch_size=len(split)))
)
test_rows, validation_rows = whole(data.test), whole(data.validation)

model = dj.models.create("mlp", widths=(128, 128))
task = dj.models.task(model, "classification", batches[0])
start = jax.vmap(lambda key: task.init(key).params)(
  jax.random.split(jax.random.key(1), MEMBERS)
)  # a leading axis of members
depths = dj.models.depths(model, batches[0]["image"])

relative = optax.cosine_decay_schedule(1.0, STEPS)
tx = optax.sgd(lambda step: 0.05 * relative(step), momentum=0.9)
METHODS = {
  "ensemble": dj.ensemble(task.loss_fn, tx),
  # Members that are shuffled to the end are worse alone.
  "wash": dj.wash(
    task.loss_fn, tx, rate=RATE, depths=depths, stop_after=STEPS - 200
  ),
  "papa": dj.papa(task.loss_fn, tx, alpha=0.95, relative_rate=relative),
}
SHUFFLES = RATE * (STEPS - 200)
print(f"WASH: {SHUFFLES:.0f} shuffles of a weight of the first layer")

# %% [markdown]
# ## Training


# %%
@jax.jit
def score(model, rows):
  """(loss in nats, accuracy)"""
  sums = task.evaluate(model, rows)
  return jnp.stack([sums["loss_sum"], sums["correct_sum"]]) / sums["weight"]


loss_of = lambda model: float(score(model, test_rows)[0])
EVERY = 100
curves, averages, members = {}, {}, {}
for name, method in METHODS.items():
  run = dj.simulate(method, workers=MEMBERS)
  state = run.init(key, start, per_worker=True)
  curves[name] = []
  for step, batch in enumerate(batches, 1):
    state, _ = run.step(state, batch, key)
    if step % EVERY == 0:
      curves[name].append(loss_of(run.params(state)))
  averages[name] = run.params(state)
  members[name] = soups.unstack(state.params)

COLOURS = dict(zip(METHODS, picture.COLOURS))
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
at = EVERY * np.arange(1, 1 + STEPS // EVERY)
for name, y in curves.items():
  axes.plot(at, y, color=COLOURS[name], label=name)
axes.set(yscale="log", xlabel="step")
axes.set_title("the members' average: test loss, nats", loc="left", fontsize=10)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Members, ensemble, average


# %%
print("of 400 test images     members         their ensemble  their average")
for name, models in members.items():
  own = [float(score(model, test_rows)[1]) for model in models]
  found = soups.evaluate_ensemble(task, models, [test_rows], ["probabilities"])
  together = found["probabilities"]
  loss, right = map(float, score(averages[name], test_rows))
  apart = soups.consensus_distance(models).total.relative
  print(
    f"{name:9} accuracy {min(own):10.4f} to {max(own):.4f}"
    f" {together['accuracy']:14.4f} {right:14.4f}\n"
    f"{'':9} loss {together['loss']:38.4f} {loss:14.4f}"
    f"   (relative distance from it {apart:.2f})"
  )

# %% [markdown]
# Independent members are the best ensemble, and their average is useless.
# WASH's average is **one network nearly as good as that ensemble**, although
# its members lie almost as far apart; alone they are worse than independent
# ones. (From four sets of initial models it was 0.3 to 1.3 points below it, 0.6
# in the mean; 400 images tell little more.) PAPA's members are all but one
# model: as good as their average, and their ensemble adds little.
#
# ## On the way from one member to another
#
# The test loss on the straight line between two members. How far it rises above
# the line between the ends' losses is the **barrier**.

# %%
paths = {
  name: soups.path(models[0], models[1], loss_of)
  for name, models in members.items()
}
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
picture.draw_paths(axes, paths, loss="test loss, nats")
plt.show()
for name, along in paths.items():
  print(
    f"{name:9} barrier {soups.barrier(along):.4f}, in the middle "
    f"{along.loss[len(along.loss) // 2]:.4f}"
  )

# %% [markdown]
# Between WASH's members the loss falls: each is a random mixture, and means of
# mixtures are nearer to the average. (Two independent members of so small a
# network can still be mixed, badly; four cannot.)
#
# ## A greedy soup
#
# If some members are bad, the average need not have them. `soups.greedy` starts
# from the best one on held-out data and adds others where that helps.

# %%
held_out = lambda model: -float(score(model, validation_rows)[0])
for name, models in members.items():
  soup = soups.greedy(models, held_out)
  loss, right = map(float, score(soup.model, test_rows))
  print(
    f"{name:9} soup of members {soup.chosen}: test loss {loss:.4f}, accuracy "
    f"{right:.4f}"
  )

# %% [markdown]
# ## What travels
#
# Bytes that a member sends in a step, read from the traced program, for four
# H100 that need not be there (the extra `distrain-jax[aot]`). Nothing runs.

# %%
COMPARED = {
  "ddp": dj.ddp(task.loss_fn, tx),
  **METHODS,
  "sparta": dj.sparta(task.loss_fn, tx, rate=RATE),
}
sent = {}
one_model = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], start))
try:
  devices = dj.inspect.topology("h100:4").devices
  for name, method in COMPARED.items():
    run = dj.distribute(method, dj.spmd.make_mesh({method.axis: -1}, devices))
    state = run.abstract(key, one_model)
    # Its step is known, so that what happens every 10 steps counts so.
    state = state._replace(step=np.zeros((), np.int32))
    found = dj.inspect.bytes_sent(run, state, batches[0], key, steps=10)
    sent[name] = sum(found.values())
except ImportError as missing:  # says which package
  print(missing)
for name, count in sent.items():
  print(
    f"{name:9} {count:9,.0f} bytes a step, {count / sent['ddp']:.4f} of DDP"
  )

# %% [markdown]
# A shuffle sends a value and no index: who sends what to whom follows from a
# key that all members share. An average of the same weights sends twice as
# much, and here it also has all layers at the full rate.
#
# ## Members leave, and come back
#
# A member is known by its number: its rows and its random keys belong to it.
# After 400 steps member 2 leaves. The others go on exactly as they were; 200
# steps later number 2 comes back and starts from their average.


# %%
def population(leave=()):
  method = dj.wash(
    task.loss_fn,
    tx,
    rate=RATE,
    depths=depths,
    stop_after=STEPS - 200,
    leave=leave,
  )
  return dj.simulate(method, workers=MEMBERS - len(leave))


def by_number(state):
  return dict(zip(state.number.tolist(), soups.unstack(state.params)))


def tell(what, run, state):
  loss, right = map(float, score(run.params(state), test_rows))
  print(
    f"{what:16} members {state.number.tolist()}: their average's test loss "
    f"{loss:.4f}, accuracy {right:.4f}"
  )


run, rows = population(), rows_of(range(MEMBERS))
state = run.init(key, start, per_worker=True)
for leave, steps in (((), 400), ((2,), 200), ((), 200)):
  here = [n for n in range(MEMBERS) if n not in leave]
  if len(here) != run.workers:  # new program, same state and place in the data
    run, was, place = population(leave), state, rows.get_state()
    state, rows = run.adopt(was), rows_of(here)
    rows.set_state(place)
    before, after = by_number(was), by_number(state)
    kept = sorted(before.keys() & after.keys())
    same = all(
      jax.tree.all(jax.tree.map(np.array_equal, before[n], after[n]))
      for n in kept
    )
    print(f"members {kept} are as they were: {same}")
    tell("at once", run, state)
  for _ in range(steps):
    state, _ = run.step(state, next(rows), key)
  tell(f"after {int(state.step)} steps", run, state)

# %% [markdown]
# ## On a TPU or on GPUs
#
# The method stays as it is; `dj.distribute` takes the place of `dj.simulate`,
# on a mesh with an axis `population`. The next cell runs on whatever devices
# there are: one member on each, or several where there are fewer than four
# (`inner` is a name for those that share a device).

# %%
mesh = dj.spmd.make_mesh({"population": -1})  # all devices in one axis
beside = -(-MEMBERS // mesh.size)  # members on a device
count = beside * mesh.size
method = dj.wash(task.loss_fn, tx, rate=RATE, depths=depths, inner="member")
run = dj.distribute(method, mesh, per_device=beside)
models = jax.vmap(lambda key: task.init(key).params)(
  jax.random.split(jax.random.key(1), count)
)
state = run.init(key, models, per_worker=True)
rows = rows_of(range(count))
for _ in range(5):
  state, metrics = run.step(state, run.put(next(rows)), key)
print(
  f"{count} members on {jax.device_count()} device(s): loss "
  f"{metrics['loss']:.4f}"
)

# %% [markdown]
# What to change for a model that is worth it:
#
# * **Install** `distrain-jax[tpu]` or `distrain-jax[cuda]`; on Colab choose the
#   runtime first and restart it after the installation.
# * **`rate`**: what carries over from task to task is the number of shuffles of
#   a weight, rate times steps. Tens of them keep members averageable; a few
#   only harm them. The default, 0.01, is for thousands of steps.
# * **`depths=dj.models.depths(model, inputs)`** for the models of `dj.models`,
#   whose blocks may be stacked in one array; without it every array is a layer.
# * **A member larger than a device**: more axes in the mesh, such as
#   `{"population": 4, "fsdp": -1}`, over which each member's weights are
#   sharded; `rows_over=("fsdp",)` divides its rows there too.
# * **Members that differ**: `learning_rates` here, and `dj.data.mixing_loss`
#   for augmentation of their own.
# * **BatchNorm**: an average has nobody's running statistics. `soups.repair`,
#   or `--config.evaluation.recalibrate=20`, estimates them anew.
# * The trainer does it by itself: `python launch/train.py
#   --config=configs/wash/digits.py --workdir=runs/wash --devices=4`; then
#   `python launch/soup.py runs/wash` draws paths and makes soups of the run.
#
# ## To try
#
# * `rate=0.002`: two shuffles of a weight. How good is the average, how good
#   are the members?
# * `dj.sparta` at the same rate: what becomes of the members' distance?
# * `shuffle_optimizer=True`: momentum moves with its weight.
# * All members from one model: `run.init(key, task.init(key).params)`. Is the
#   ensemble's average still useless?
