"""The networks and rows of launch/compare_petra.py, and what is read off each.

Letters: J stages, k or M micro-batches a step.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distrain_jax import inspect
from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.engine import Engine
from distrain_jax.pipelining.fifo import Fifo
from distrain_jax.pipelining.plan import Plan
from distrain_jax.train import default_config, experiment, model_config
from distrain_jax.train import pipelined as pipelines

MICRO_BATCHES = 32  # of the synchronous ones' step, and of PETRA's with k


class Network(NamedTuple):
  """A model and its micro-batches."""

  model: dict[str, Any]
  data: dict[str, Any]
  optimizer: str
  rows: int  # of a micro-batch
  deep: str | None = None  # the model's option that grows with J, if one does


NETWORKS = {
  # Couplings alone, one a stage but for the first and the last.
  "chain": Network(
    {"name": "rev_mlp", "width": 1024, "hidden": 4096, "dtype": "bfloat16"},
    {"name": "digits"},
    "momentum",
    1024,
    "blocks",
  ),
  "rev_llama 134M": Network(
    {"name": "rev_llama", "preset": "134M", "dtype": "bfloat16"},
    {"name": "tokens", "length": 1024},
    "adamw",
    1,
  ),
  "revnet50": Network(
    {"name": "revnet50", "stem": "imagenet", "classes": 1000},
    {"name": "imagenet2012", "image_size": 224},
    "momentum",
    64,
  ),
}


class Row(NamedTuple):
  """One program."""

  name: str
  method: dict[str, Any]
  micro: int  # micro-batches a step


def rows(network: str, count: int) -> list[Row]:
  """Every row for a network on J devices; of a longer chain only two."""
  m = MICRO_BATCHES

  def petra(name, k=1, **options):
    return Row(name, {"name": "petra", **options}, k)

  def synchronous(name, **options):
    return Row(name, {"name": "pipeline", **options}, m)

  two = [petra("PETRA"), petra("inputs kept", buffer="input")]
  if equal_stages(network) and count > 8:
    return two
  return [
    *two,
    petra("inputs, parameters kept", buffer="input_params"),
    petra("graphs kept", buffer="graph"),
    petra(f"PETRA, k={m}", m),
    synchronous("1F1B, inputs kept", buffer="input"),
    synchronous("1F1B, graphs kept", buffer="graph"),
    synchronous("GPipe, inputs kept", buffer="input", schedule="gpipe"),
    synchronous("1F1B, reversible", buffer="none"),
  ]


def equal_stages(network: str) -> bool:
  """Whether a pass forward costs the same on any stage, roughly."""
  return NETWORKS[network].deep is not None


def config(
  network: str, row: Row, count: int, given: dict[str, Any]
) -> ConfigDict:
  """A row as a config.

  Args:
    network: of NETWORKS.
    row: of it.
    count: J.
    given: {field: value}, over those of the network.
  """
  net, c = NETWORKS[network], default_config()
  deep = {} if net.deep is None else {net.deep: count - 2}
  c.model = model_config(**net.model, **deep)
  c.data.update(net.data)
  c.optimizer.name = net.optimizer
  c.mesh = ConfigDict({"stage": -1})
  c.batch_size = net.rows * row.micro
  c.evaluation.batch_size = count
  with c.unlocked():
    c.method.update(row.method, accumulate=row.micro)
    c.update_from_flattened_dict(given)
  return c.lock()


class Compiled(NamedTuple):
  """A row's program."""

  config: ConfigDict
  program: experiment.Program
  cut: Any  # its `pipelining.Partition`
  plan: Plan


def build(c: ConfigDict, info: Any, devices: Any) -> Compiled:
  """A row, checked; compiles nothing."""
  program = experiment.program(c, info, devices)
  cut, told = pipelines.partition(
    c,
    program.model,
    program.task,
    experiment.example(info),
    program.run.mesh.shape,
  )
  told = {name: told[name] for name in ("shapes", "example", "inputs")}
  mode = plans.BUFFERS[c.method.get("buffer") or "none"]
  gpipe = c.method.get("schedule") == "gpipe"
  plan = plans.make_plan(cut.stages, mode=mode, keep_last=gpipe, **told)
  return Compiled(c, program, cut, plan)


def compile(built: Compiled) -> inspect.Report:
  """The step, with its batch where the method wants it: whole on each device."""
  state, batch, key = built.program.abstract()
  run = built.program.run
  place = lambda tree: _placed(tree, run.mesh)
  arguments = state, place(batch), place(key)
  return inspect.read(
    run.step.lower(*arguments).compile(),
    arguments,
    list(run.mesh.devices.flat),
    name=run.method.name,
    state=state,
  )


def forward(built: Compiled) -> inspect.Report:
  """A pass forward of a stage and nothing else, of a network of equal ones."""
  plan = built.plan
  stage = int(np.argmax(built.cut.flops[:-1]))
  mesh = built.program.run.mesh

  def fn(params, states, x, key):
    keys = [key] * len(plan.stages[stage])
    return plans.forward(plan, stage, params, states, x, keys)[0]

  zeros = lambda packing: packing.unpack(packing.zeros(), stage)
  own = jax.eval_shape(lambda: (zeros(plan.params), zeros(plan.model_state)))
  key = jax.eval_shape(lambda: jax.random.key(0))
  arguments = (*own, plan.inputs[stage][0], key)
  return inspect.compile(jax.jit(fn), *_placed(arguments, mesh))


def _placed(tree: Any, mesh: Any) -> Any:
  one = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, P())
  )
  return jax.tree.map(one, tree)


def measured(
  built: Compiled, row: Row, report: inspect.Report
) -> dict[str, Any]:
  """What is kept of a compiled step; of one device."""
  plan, state = built.plan, built.program.abstract()[0].inner
  memory, ticks = report.memory, _ticks(built, row)
  engine = Engine(plan, "stage")
  flight = jax.eval_shape(engine.nothing_in_flight)
  fifo = flight.fifo
  if row.method["name"] == "pipeline":
    most = row.micro
    flight = jax.eval_shape(lambda: engine.nothing_in_flight(most))
    gpipe = row.method.get("schedule") == "gpipe"
    fifo = flight.fifo
    if gpipe:
      fifo = jax.eval_shape(Fifo(plan.entries, (most,) * plan.count).empty)
  model = ("params", "model_state", "opt_state", "grads")
  held = inspect.bytes_held
  parts = {
    "model": held([getattr(state, f, ()) for f in model]),
    "messages": _bytes((flight.up, flight.down)),
    "FIFO": _bytes(fifo),
    "batch": memory.batch,
  }
  parts["temporaries"] = memory.peak - sum(parts.values())
  return {
    "stages": plan.count,
    "micro": row.micro,
    "ticks": ticks,
    "peak": memory.peak,
    "parts": parts,
    "memory": memory._asdict(),
    "params": held(state.params),
    "flops_a_tick": report.flops / ticks,
    "wire_a_tick": report.wire_bytes / ticks,
    "seconds": report.step.seconds,
    "communication_seconds": report.communication_seconds,
    "exposed_seconds": report.exposed_seconds,
    "messages": _messages(report),
    "unknown": list(report.step.unknown),
    "imbalance": built.cut.imbalance,
    "padding": _padding(plan),
  }


def _ticks(built: Compiled, row: Row) -> int:
  """Of a step; in each, every stage goes forward once and back once."""
  if row.method["name"] == "petra":
    return row.micro
  gpipe = row.method.get("schedule") == "gpipe"
  return row.micro + (built.plan.count - 1) * (1 if gpipe else 2)


def _messages(report: inspect.Report) -> list[dict[str, Any]]:
  """Between neighbours: one dict a collective of the program."""
  return [
    {
      "bytes": c.collective.bytes,
      "runs": c.runs,
      "up": [0, 1] in [list(pair) for pair in c.collective.groups or ()],
      "asynchronous": c.window is not None,
      "seconds": c.seconds,
      "exposed_seconds": c.exposed,
      "flops_beside": c.window.flops if c.window else 0.0,
    }
    for c in report.step.communication
    if c.collective.kind == "collective-permute"
  ]


def _padding(plan: Plan) -> dict[str, list[int]]:
  """Bytes of each stage's buffers that it has no use for; of one entry."""
  packings = {
    "params": plan.params,
    "up": plan.boundaries,
    "down": plan.returns,
    "entry": plan.entries,
  }
  return {name: list(p.padding()) for name, p in packings.items()}


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )
