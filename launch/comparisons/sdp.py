"""The rows of launch/compare_sdp.py, and what is read off each program."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from distrain_jax import inspect, models

LEVELS = ("neuron", "block")
CHUNKS = {"loss.logits_chunk": 128}  # tokens of a row
COVERAGES = ("3/4", "1/2", "3/8", "1/4")
LOW = {
  "method.shard_optimizer": True,
  "method.param_dtype": "bfloat16",
  "method.wire_dtype": "bfloat16",
}


class Row(NamedTuple):
  """One program."""

  name: str
  changes: dict[str, Any]  # config.FIELD -> value
  batch: int  # rows of a worker
  level: str | None = None  # of SDP
  coverage: str | None = None
  against: str = "DDP"

  def told(self) -> dict[str, Any]:
    """As it is kept."""
    fields = ("name", "batch", "level", "coverage", "against")
    return {field: getattr(self, field) for field in fields}


def rows(c: ConfigDict, workers: int, batch: int) -> list[Row]:
  """Every row for a config.

  Args:
    c: the config as it is.
    workers: N.
    batch: rows of a worker, in one micro-batch. Some rows repeat DDP and SDP
      with the config's own micro-batch, of `batch_size / N / accumulate` rows.
  """

  def row(name, changes, size=batch, **how):
    cut = {"batch_size": workers * size, "method.accumulate": 1}
    return Row(name, {**cut, **changes}, size, **how)

  def sdp(level, coverage, more="", size=batch, **changes):
    options = {
      "method.name": "sdp",
      "method.level": level,
      "method.masking": "forward",
      "method.coverage": float(Fraction(coverage)),
    }
    how = {"level": level, "coverage": coverage}
    if size != batch:
      how["against"] = f"DDP{more}"
    name = f"SDP {level} {coverage}{more}"
    return row(name, {**options, **changes}, size, **how)

  found = [row("DDP", {})]
  if c.model.remat not in (None, "none"):
    found.append(row("DDP, nothing recomputed", {"model.remat": "none"}))
  found += [
    row("ZeRO-1", {"method.name": "zero1"}),
    row("FSDP", {"method.name": "fsdp"}),
    row("DDP, dropout 0.1", {"model.dropout": 0.1}),
    row("DDP, stochastic depth 1/2", {"model.stochastic_depth": 0.5}),
    *(row(f"dense {s}", _smaller(c, Fraction(s))) for s in ("1/2", "1/4")),
  ]
  found += [sdp(level, s) for level in LEVELS for s in COVERAGES]
  low = ", sharded, bfloat16"
  found += [sdp(level, "1/2", low, **LOW) for level in LEVELS]
  own = c.batch_size // workers // c.method.accumulate
  if own != batch:
    for how, changes in (("", {}), (", logits in chunks", CHUNKS)):
      more = f", {own} rows{how}"
      found.append(row(f"DDP{more}", changes, own, against=f"DDP{more}"))
      found += [sdp(level, "1/2", more, own, **changes) for level in LEVELS]
  return found


def _smaller(c: ConfigDict, scale: Fraction) -> dict[str, Any]:
  """The model with as many hidden units and heads as a subnetwork."""
  full = model_config(c)
  sizes = {n: getattr(full, n) for n in ("mlp", "heads", "kv_heads")}
  sizes = {n: math.ceil(size * scale) for n, size in sizes.items()}
  changes = {f"model.{n}": size for n, size in sizes.items()}
  return {**changes, "model.head_dim": full.head_dim}


def model_config(c: ConfigDict) -> Any:
  """The sizes of the config's Llama."""
  options = {k: v for k, v in dict(c.model).items() if v is not None}
  return models.create(**options).config


def measured(
  c: ConfigDict, program: Any, report: inspect.Report
) -> dict[str, Any]:
  """What is kept of a compiled step; of one device."""
  state, batch, _ = program.abstract()
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  tokens = batch["tokens"]
  params = models.abstract(program.model, tokens).params
  inner = getattr(state, "inner", state)  # of the guard
  shared = count(params)
  if c.method.name == "sdp":
    shared = count(inner.params.shared)
  config = program.model.config
  head = 3 * 2 * math.prod(tokens.shape) * config.embed * config.vocab
  memory = report.memory
  return {
    "peak": memory.peak,
    "state": sum(memory.state.values()),
    "memory": memory._asdict(),
    "flops": report.flops,
    # Of them the output layer's, three products of all devices' tokens.
    "head_flops": head / report.devices,
    "wire": report.wire_bytes,
    "wire_by_kind": report.wire_by_kind(),
    "workers": report.devices,
    "params": count(params),
    "shared": shared,  # of them
    "on_activations": on_activations(report, state, params, batch),
    "unknown": list(report.step.unknown),
    "compile_seconds": round(report.compile_seconds, 1),
  }


def on_activations(
  report: inspect.Report, state: Any, params: Any, batch: Any
) -> list[str]:
  """Collectives inside of the loss of an array with an axis of tokens.

  Outside of it there are no activations. Inside an axis may be as long by
  chance: what is shaped as an array of the model or of the state, or as one
  layer of them, is no activation.
  """
  (total, length), n = batch["tokens"].shape, report.devices
  rows = total // n
  arrays = [
    x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    for x in (*jax.tree.leaves(state), *jax.tree.leaves(params))
  ]
  known = {_key(shape[i:]) for shape in arrays for i in (0, 1)}

  def tokens(dims) -> bool:
    dims = tuple(d for d in dims if d > 1)
    axes = (length,) if rows == 1 else (rows, length)
    beside = [dims[i : i + len(axes)] for i in range(len(dims))]
    return len(dims) > 1 and (axes in beside or rows * length in dims)

  found = []
  for c in report.step.communication:
    one = c.collective
    within = "jvp" in one.op_name or not one.op_name  # or it is not known
    if within and any(tokens(d) and _key(d) not in known for d in one.shapes):
      found.append(f"{one.kind} {one.dtype} {one.bytes} bytes: {one.op_name}")
  return found


def _key(dims) -> tuple[int, ...]:
  """A shape up to the order of its axes."""
  return tuple(sorted(d for d in dims if d > 1))
