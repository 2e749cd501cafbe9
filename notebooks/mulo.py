# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # μLO: a learned optimizer that holds at widths it has not seen
#
# AdamW is a rule that people wrote: of a gradient and two of its averages it
# makes a step. A **learned optimizer** is a rule that training wrote: a small
# network, the same for every element of every parameter, reads 39 numbers about
# an element (its gradient, itself, averages at several rates, how long training
# has gone on) and says how far it moves. Its weights θ, 2,409 numbers, were
# found by **meta-training**: change θ, train networks by it, keep what made
# them learn faster.
#
# Meta-training is affordable on small networks only. Used on wider ones such
# rules break. [μLO](https://arxiv.org/abs/2406.00153) (Thérien et al., 2024)
# meta-trains under **μP** ([2203.03466](https://arxiv.org/abs/2203.03466)), in
# which a step means the same at every width:
#
# | a parameter | starts at | forward | a step of size 1 is multiplied by |
# |---|---|---|---|
# | hidden kernel (both sides grow) | 1/√fan-in | 1 | 1/fan-in |
# | first layer, biases, norms | a size of its own | 1 | 1 |
# | output layer | 0 | 1/fan-in | 1 |
#
# What follows runs on a laptop in a minute, with the weights that the package
# ships and real data. The end says what to change on a TPU or GPU.

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

import distrain_jax as dj

WIDTHS, STEPS, ROWS = (16, 256), 150, 64
key = jax.random.key(0)

# %% [markdown]
# ## Data and models
#
# scikit-learn's digits, and MLPs of three hidden layers. `mup=True` makes a
# model one in μP; `dj.mup_info` reads from the names of a model's axes which
# parameter is of which kind.

# %%
data = dj.data.load("digits")
rows = dj.data.train_iterator(data.train, batch_size=ROWS, seed=0, threads=0)
batches = [next(rows) for _ in range(STEPS)]
stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)


@functools.cache
def built(width, mup):
  """(model, task, what μP knows of its parameters; 1 without μP)"""
  model = dj.models.create("mlp", widths=(width,) * 3, mup=mup)
  task = dj.models.task(model, "classification", batches[0])
  image = batches[0]["image"]
  params = dj.models.abstract(model, image).params
  names = dj.models.logical_names(model, image)
  return model, task, dj.mup_info(params, names=names) if mup else 1.0


_, _, info = built(64, True)
for path, x in jax.tree_util.tree_leaves_with_path(info):
  name = jax.tree_util.keystr(path)
  print(f"{name:24} {x.kind:7} fan-in {x.fan_in:3}, step x {x.multiplier:.4f}")

# %% [markdown]
# ## The coordinate check
#
# Train for a few steps at two widths or more and look how far the activations of
# every layer have moved. In μP that is nearly the same at all widths; a line that
# rises or falls says that something is not scaled as it should be.


# %%
def probe(mup):
  def build(width, key):
    model, _, info = built(width, mup)
    tx = dj.mup_adamw(0.02, info) if mup else optax.adamw(1e-3)
    loss = lambda y, batch: jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])
    )
    return dj.flax_probe(model, key, tx, batches[0], inputs="image", loss=loss)

  return build


checks = {
  "standard parametrisation, AdamW": dj.coord_check(
    probe(False), (64, 512), batches[0], steps=8
  ),
  "μP, its AdamW": dj.coord_check(probe(True), (64, 512), batches[0], steps=8),
}
figure, axes = plt.subplots(
  1, 2, figsize=(9, 3.4), sharey=True, layout="constrained"
)
for ax, (title, check) in zip(axes, checks.items(), strict=True):
  for layer, moved in check.moved.items():
    if layer != "whole":
      ax.plot(check.widths, moved[:, -1], marker="o", label=layer)
  ax.set(xscale="log", yscale="log", xlabel="width")
  ax.set_title(title, loc="left", fontsize=10)
  ax.set_xticks(check.widths, check.widths)
  ax.minorticks_off()
axes[0].set_ylabel("movement of activations")
axes[0].legend(frameon=False)
plt.show()
for title, check in checks.items():
  growth = ", ".join(f"{k} {x:.2f}" for k, x in check.growth().items())
  print(f"{title}, 512 wide over 64 wide: {growth}")

# %% [markdown]
# ## Untuned, at any width
#
# `dj.mulo(mup=...)` takes the weights that were made under μP, `dj.mulo()` a twin
# that was made without it, on the same networks (16 to 64 units wide), as
# long. Neither has a learning rate to choose. Beside them AdamW as it comes.


# %%
def trained(make_tx, width, mup):
  """Training losses, one of each step."""
  _, task, info = built(width, mup)
  tx = make_tx(info)

  @jax.jit
  def run(params):
    def step(carry, batch):
      params, state = carry
      value = lambda p: task.loss_fn(p, batch, key)[0]
      loss, grads = jax.value_and_grad(value)(params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, tx.init(params)), stacked)[1]

  return np.asarray(run(task.init(jax.random.key(1)).params))


OPTIMIZERS = {
  "mulo": (lambda info: dj.mulo(mup=info), True),
  "its twin without μP": (lambda info: dj.mulo(), False),
  "AdamW, 0.001": (lambda info: optax.adamw(1e-3), False),
}
losses = {
  name: {w: trained(make_tx, w, mup) for w in WIDTHS}
  for name, (make_tx, mup) in OPTIMIZERS.items()
}

figure, axes = plt.subplots(
  1, len(losses), figsize=(10, 3.4), sharey=True, layout="constrained"
)
smooth = lambda x: np.convolve(x, np.full(10, 0.1), mode="valid")
for ax, (name, curves) in zip(axes, losses.items(), strict=True):
  for width, curve in curves.items():
    ax.plot(smooth(curve), label=f"{width} wide")
  ax.set(yscale="log", xlabel="step")
  ax.set_title(name, loc="left", fontsize=10)
  ax.grid(alpha=0.3)
axes[0].set_ylabel("training loss, nats")
axes[0].legend(frameon=False)
plt.show()
print("training loss, last 20 steps " + "".join(f"{w:>8} wide" for w in WIDTHS))
for name, curves in losses.items():
  last = "".join(f"{curves[w][-20:].mean():13.4f}" for w in WIDTHS)
  print(f"{name:28} {last}")

# %% [markdown]
# **Under μP wider is better**, as it should be; the twin, the better one at the
# width it knows, gets worse where its networks were never as wide. AdamW's usual rate
# happens to be right at 256 and is far too low at 16. How the two compare on other
# data, deeper and longer, and where tuned AdamW wins, is in the README and in the
# card beside the weights, `learned/weights/mulo.md`.
#
# ## In a distributed method
#
# `dj.mulo` is an optax transform: it chains, masks, and trains inside the methods.
# The rule needs a whole matrix at a time, so that ZeRO-1 shards its state, 16
# bytes a parameter, by whole leaves.

# %%
_, task, info = built(64, True)
start = task.init(jax.random.key(1)).params
METHODS = {
  "ddp": dj.ddp(task.loss_fn, dj.mulo(mup=info)),
  "zero1": dj.zero1(task.loss_fn, dj.mulo(mup=info), shard="leaves"),
}
models = {}
for name, method in METHODS.items():
  run = dj.simulate(method, workers=4)
  state = run.init(key, start)
  for batch in batches[:20]:
    state, metrics = run.step(state, batch, key)
  models[name] = run.params(state)
  held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
  held //= 4 if name == "zero1" else 1
  print(
    f"{name:6} loss after 20 steps {float(metrics['loss']):.4f}, optimizer "
    f"state of a worker {held:,} bytes"
  )
apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *models.values())
print(f"largest difference of a weight: {max(jax.tree.leaves(apart)):.1e}")

# %% [markdown]
# ## On a TPU or GPU
#
# - `run = dj.distribute(method, dj.spmd.make_mesh({"data": -1}))` in the place of
#   `dj.simulate`.
# - `dj.mulo(mup=..., implementation="pallas")` keeps the rule's hidden units on the
#   chip (TPUs, and NVIDIA GPUs from Hopper on).
# - Your own model: `dj.mup_info(params, names=...)` where it has names of axes,
#   `other=` the shapes of the same model at another width where it has none; and
#   `dj.coord_check` before anything else.
# - Meta-train a rule of your own: `launch/meta_train.py`, `dj.mulo_meta`.
