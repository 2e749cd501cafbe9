r"""Meta-trains the learned optimizer of a config, and draws how it went.

  python launch/meta_train.py --config=configs/mulo/tiny.py --workdir=runs/tiny
  python launch/meta_train.py --config=configs/mulo/cpu.py --workdir=runs/mulo \
    --config.steps=500 --devices=2

Writes theta.safetensors, metrics.jsonl and meta_loss.png to the workdir. Run
again with the same workdir, it goes on from the last state saved. Leaves with
75 when SIGTERM or SIGINT stopped it and its state is saved.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from distrain_jax import spmd
from distrain_jax.train.flags import parse_flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs import each other

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/mulo/X.py")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
DEVICES = flags.DEFINE_integer(
  "devices", None, "Simulate so many CPU devices; unset: what is there."
)
flags.mark_flags_as_required(["config", "workdir"])


def resident(name: str, pool: int) -> dict[str, Any]:
  """A data set's training part as arrays: x (n, ...) float32, y (n,) int32.

  Args:
    name: "teacher", or a data set of images that `distrain_jax.data` knows.
    pool: images are averaged over pool x pool pixels; a rest is cut off.
  """
  import numpy as np

  from distrain_jax import data
  from distrain_jax.learned import meta

  if name == "teacher":
    return meta.teacher_data()
  found = data.load(name)
  arrays = data.in_memory(found.train).arrays
  x = arrays["image"].astype(np.float32)
  n, h, w, c = x.shape
  h, w = h // pool, w // pool
  x = x[:, : h * pool, : w * pool].reshape(n, h, pool, w, pool, c)
  x = x.mean((2, 4))
  # Mean and deviation of what the network sees, per channel.
  axes = (0, 1, 2)
  x = (x - x.mean(axes)[None]) / x.std(axes)[None]
  return {"x": x, "y": arrays["label"].astype(np.int32)}


def tasks(c) -> list[Any]:
  """The config's tasks; data sets that several have are read once."""
  import jax

  from distrain_jax.learned import meta

  loaded, found = {}, []
  for name, t in c.tasks.items():
    source = (t.data, t.pool)
    if source not in loaded:
      loaded[source] = jax.device_put(resident(*source))
    own = meta.mlp_task(
      loaded[source],
      t.widths,
      name=name,
      batch_size=t.batch_size,
      mup=c.mup,
    )
    found.append(own)
  return found


def architecture(c):
  """The rule's constants, and theta's start as a function of a key."""
  from distrain_jax import learned

  if c.architecture not in ("small_fc", "velo"):
    raise ValueError(
      f"config.architecture={c.architecture!r} is small_fc, muLO's, or velo."
    )
  known = {"update_norm": "rms", "eps_scaling": "fan_in"}
  for field, value in known.items():
    if c[field] and (c[field] != value or c.architecture == "velo"):
      raise ValueError(
        f"config.{field}={c[field]!r} is '' or, of small_fc alone, {value}."
      )
  if c.architecture == "small_fc":
    rule = learned.Rule(
      c.step_mult,
      c.exp_mult,
      c.feature_eps,
      update_norm=c.update_norm or None,
      eps_scaling=c.eps_scaling or None,
    )
    return rule, learned.init_theta
  rule = learned.VeloRule(
    num_steps=c.max_length,  # each trajectory is told its own
    lstm=c.lstm,
    step_mult=c.step_mult,
    exp_mult=c.exp_mult,
    interp_mult=c.interp_mult,
    param_scale_mult=not c.mup,
    feature_eps=c.feature_eps,
  )
  return rule, lambda key: learned.init_velo_theta(key, c.lstm, c.bank)


def build(c):
  """`MetaTraining`, the tasks, and the state at the start."""
  import jax

  from distrain_jax.learned import meta

  rule, init_theta = architecture(c)
  found = tasks(c)
  problems = [meta.training(t, rule, augment=c.augment) for t in found]
  tx = meta.outer_adamw(
    c.steps,
    peak=c.learning_rate,
    final=c.final_learning_rate,
    warmup=c.warmup,
    weight_decay=c.weight_decay,
  )
  fields = {name: c[name] for name in meta.Settings._fields}
  count = jax.device_count()
  mesh = spmd.make_mesh({"tasks": count}) if count > 1 else None
  run = meta.trainer(problems, tx, meta.Settings(**fields), mesh=mesh)
  for_theta, for_pairs, key = jax.random.split(jax.random.key(c.seed), 3)
  state = run.init(init_theta(for_theta), for_pairs)
  return run, found, state, key


def draw(lines: list[dict[str, Any]], path: Path) -> None:
  """The meta-loss, of each task and of all, against the meta-step."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  steps = [line["step"] for line in lines]
  for name in lines[0]["losses"]:
    axes.plot(steps, [x["losses"][name] for x in lines], lw=0.8, label=name)
  mean = [line["meta_loss"] for line in lines]
  axes.plot(steps, mean, color="black", label="mean")
  axes.set(xlabel="meta-step", ylabel="mean training loss")
  axes.legend(fontsize="small")
  figure.savefig(path, dpi=130)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  if DEVICES.value is not None:
    spmd.use_cpu_devices(DEVICES.value)
  from distrain_jax import train

  try:
    train_theta(CONFIG.value, Path(WORKDIR.value))
  except train.Interrupted:
    sys.exit(train.EXIT_CODE)
  except (ValueError, FileNotFoundError, ImportError) as e:
    sys.exit(f"{type(e).__name__}: {e}")


def train_theta(c, workdir: Path) -> None:
  """Runs, or goes on with, the meta-training of a config."""
  import numpy as np

  from distrain_jax import train
  from distrain_jax.learned import meta, save_theta
  from distrain_jax.train.interrupt import StopSignal

  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(c.to_json_best_effort(indent=2))
  run, found, state, key = build(c)
  data, names = tuple(t.data for t in found), [t.name for t in found]
  saved, log = workdir / "state.npz", workdir / "metrics.jsonl"
  lines = []
  if saved.exists():
    state = meta.restore(saved, state)
    if log.exists():
      lines = [json.loads(line) for line in log.read_text().splitlines()]
    # Lines after the last save are of steps that are done again.
    lines = [line for line in lines if line["step"] <= int(state.step)]
  with StopSignal() as stop:
    start, since = time.monotonic(), int(state.step)
    recent = []
    for step in range(since + 1, c.steps + 1):
      state, metrics = run.step(state, data, key)
      recent.append(np.asarray(metrics["losses"]))
      last = step == c.steps or stop.seen
      if step % c.log_every == 0 or last:
        losses = np.mean(recent, 0)
        recent = []
        lines.append(
          {
            "step": step,
            "meta_loss": round(float(losses.mean()), 5),
            "losses": {n: round(float(x), 5) for n, x in zip(names, losses)},
            "grad_norm": round(float(metrics["grad_norm"]), 5),
            "seconds": round(time.monotonic() - start, 1),
          }
        )
        pace = (time.monotonic() - start) / (step - since)
        print(
          f"{step}/{c.steps} meta-loss {losses.mean():.4f} {pace:.2f} s/step",
          flush=True,
        )
      if step % c.save_every == 0 or last:
        meta.save(saved, state)
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_theta(workdir / "theta.safetensors", state.theta, about(c, step))
        if lines:
          draw(lines, workdir / "meta_loss.png")
      if stop.seen and step < c.steps:
        raise train.Interrupted(step)
  print(f"theta: {workdir}/theta.safetensors")


def about(c, step: int) -> dict[str, str]:
  """What a theta's file says of its making."""
  velo = {"lstm": str(c.lstm), "bank": str(c.bank)}
  velo["interp_mult"] = str(c.interp_mult)
  velo["param_scale_mult"] = str(not c.mup)
  small = {"update_norm": c.update_norm, "eps_scaling": c.eps_scaling}
  return {
    "architecture": c.architecture,
    **(velo if c.architecture == "velo" else small),
    "step_mult": str(c.step_mult),
    "exp_mult": str(c.exp_mult),
    "feature_eps": str(c.feature_eps),
    "mup": "absolute" if c.mup else "none",
    "meta_steps": str(step),
    "seed": str(c.seed),
    "tasks": ", ".join(c.tasks),
  }


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
