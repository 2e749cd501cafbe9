"""The rows of launch/compare_wash.py, and what is read off each program."""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from distrain_jax import inspect
from distrain_jax.population import members, rates

MODELS = ("llama 134M", "resnet50")
LIMIT = 0.05  # of an exchange's temporaries, over the parameters
ROWS_OF_A_MEMBER = {"llama 134M": 1, "resnet50": 16}


class Row(NamedTuple):
  """One program."""

  name: str
  method: dict[str, Any]  # config.method


def rows() -> list[Row]:
  wash = lambda rate, **more: {"name": "wash", "rate": rate, **more}
  return [
    Row("DDP", {"name": "ddp"}),
    Row("ensemble", {"name": "ensemble"}),
    Row("WASH 0.001", wash(0.001)),
    Row("WASH 0.01", wash(0.01)),
    Row("WASH 0.01, constant", wash(0.01, layer_schedule="constant")),
    Row("WASH 0.01 and optimizer", wash(0.01, shuffle_optimizer=True)),
    Row("SPARTA 0.005", {"name": "sparta", "rate": 0.005}),
    Row("PAPA every 10", {"name": "papa", "every": 10}),
  ]


def config(model: str, row: Row, workers: int) -> ConfigDict:
  """The paper-scale config of a model with a row's method."""
  from configs import fineweb_llama, imagenet_resnet50

  if model == "resnet50":
    c = imagenet_resnet50.get_config()
  else:
    c = fineweb_llama.get_config(model.split()[1])
  with c.unlocked():
    c.mesh = {"data" if row.method["name"] == "ddp" else "population": -1}
    for option in c.method:
      c.method[option] = None
    c.method.update(row.method)
    c.batch_size = workers * ROWS_OF_A_MEMBER[model]
    c.evaluation.batch_size = workers
  return c


def measured(
  c: ConfigDict, program: Any, report: inspect.Report
) -> dict[str, Any]:
  """What is kept of a compiled step; of one device."""
  state, batch, _ = program.abstract()
  params = getattr(state, "inner", state).params  # of the guard
  if program.run.method.population:
    of_one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    params = jax.tree.map(of_one, params)
  told = report.to_json()
  size = lambda x: math.prod(x.shape) * x.dtype.itemsize
  return {
    "parameters": sum(map(size, jax.tree.leaves(params))),
    "wanted": _wanted(c, program, params, next(iter(batch.values()))),
    "memory": told["memory"],
    # Temporaries that live while the exchange runs; None: there is none.
    "exchange_bytes": report.buffers.during(members.SCOPE),
    "wire_bytes": told["wire_bytes"],
    "wire_bytes_by_kind": told["wire_bytes_by_kind"],
    "model": told["model"],
    "collectives": told["collectives"],
  }


def _wanted(c: ConfigDict, program: Any, params, inputs) -> float | None:
  """Of WASH: rate x bytes x (N - 1) / N, summed over the layers' rates."""
  if c.method.name != "wash":
    return None
  from distrain_jax import models

  found = rates.layer_rates(
    "wash",
    params,
    models.depths(program.model, inputs),
    rate=c.method.rate,
    layer_schedule=c.method.layer_schedule or "decreasing",
    equal_volume=False,
  )
  moved = sum(
    rate.sum() * x.size / max(rate.size, 1) * x.dtype.itemsize
    for rate, x in zip(found, jax.tree.leaves(params))
  )
  trees = 3 if c.method.shuffle_optimizer else 1  # with AdamW's two moments
  if c.optimizer.name == "momentum" and trees > 1:
    trees = 2
  n = program.run.workers
  return trees * moved * (n - 1) / n


def markdown(found: list[dict[str, Any]]) -> str:
  """The table for README."""
  headers = ("method", "sent, MB", "asked for, MB", "exposed, ms")
  headers += ("live during it, MB", "all temporaries, MB", "peak, GB")
  lines = [headers, ("---", *["---:"] * 6)]
  for x in found:
    if "refused" in x:
      lines.append((x["name"], x["refused"], *[""] * 5))
      continue
    wanted = "" if x["wanted"] is None else f"{x['wanted'] / 1e6:,.3f}"
    lives = x["exchange_bytes"]
    lines.append(
      (
        x["name"],
        f"{x['wire_bytes'] / 1e6:,.3f}",
        wanted,
        f"{1e3 * x['model']['exposed_communication_seconds']:.3f}",
        "" if lives is None else f"{lives / 1e6:,.2f}",
        f"{x['memory']['temporaries'] / 1e6:,.0f}",
        f"{x['memory']['peak'] / 1e9:.2f}",
      )
    )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims(found: list[dict[str, Any]]) -> list[str]:
  """Sentences: what is promised, and what was compiled."""
  by_name = {x["name"]: x for x in found if "refused" not in x}
  base, said = by_name.get("ensemble"), []
  for name, x in by_name.items():
    if x["wanted"] is None:
      continue
    ratio = x["wire_bytes"] / x["wanted"]
    holds = _holds(abs(ratio - 1) < 0.1)
    said.append(
      f"{name}: sends {ratio:.3f} of what its rates ask for, promised within "
      f"10 %: {holds}."
    )
    said += [f"{name}: {text}" for text in _temporaries(x, base)]
  return said


def _temporaries(x: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
  """Of the exchange.

  On a TPU it runs in a loop of its own, and what lives meanwhile is its. On a
  GPU it runs between other members of the update, whose gradients live as well:
  there it is what all temporaries grow by. That they grow on a TPU by more is
  how XLA packs activations anew, which are gone when an exchange runs.
  """
  on_tpu, lives, said = x["hardware"].startswith("v"), x["exchange_bytes"], []
  share = None if lives is None else lives / x["parameters"]
  if on_tpu:
    good = share is not None and share < LIMIT
    held = (
      "none was found" if share is None else f"{share:.2%} of the parameters"
    )
    said.append(
      f"temporaries that live during the exchange: {held}, promised below "
      f"{LIMIT:.0%}: {_holds(good)}."
    )
  if base is None:
    return said
  extra = x["memory"]["temporaries"] - base["memory"]["temporaries"]
  grown = (
    f"all temporaries {extra / x['parameters']:+.2%} of the parameters, "
    f"{extra / base['memory']['peak']:+.2%} of the peak, beside the ensemble's"
  )
  if not on_tpu:
    good = lives is not None and extra < LIMIT * x["parameters"]
    grown += f", promised below {LIMIT:.0%}: {_holds(good)}"
  return [*said, f"{grown}."]


def _holds(good: bool) -> str:
  return "holds" if good else "DOES NOT HOLD"
