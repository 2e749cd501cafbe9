"""The one home of a run's fields: their defaults and meanings.

A file under configs/ starts from `default_config()` and changes fields; the
command line changes more (`--config.batch_size=64`).
"""

import difflib
import importlib.util
import inspect
import typing
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, config_dict

from distrain_jax import methods, models

# Options that the trainer itself passes to a method or a loss.
OWN_OPTIONS = (
  "axis",
  "blocks",
  "bytes_per_token",
  "depths",
  "example",
  "inner",
  "inputs",
  "names",
  "relative_rate",
  "repair",
  "replicas",
  "shapes",
  "stacked",
  "stateful",
  "writers",
)


def default_config() -> ConfigDict:
  """Every field that all runs share, each with its default and meaning."""
  c = ConfigDict()
  c.seed = 0  # the only randomness: parameters, data order, dropout
  c.steps = 1000
  c.batch_size = 128  # global: divided among the workers

  c.mesh = ConfigDict({"data": -1})  # axis -> size; -1: the devices left
  # So many devices, all simulated on one that is there, by vmap: a method's
  # workers on the one GPU or TPU of a notebook. 0: the devices that there are.
  # On a CPU --devices=N of launch/train.py is as good, and mostly faster.
  c.simulate = 0
  # Logical axis name of the parameters -> mesh axis they are sharded over,
  # e.g. {"mlp": "tensor"}; that axis must not be the method's own.
  c.sharding = ConfigDict()

  c.method = ConfigDict({"name": "ddp"})  # see distrain_jax.methods
  c.method.update(method_options())  # None: the method's own default

  # How the members of a population (ensemble, wash, sparta, papa, dart) differ;
  # see also config.method.learning_rates. Other methods refuse it.
  c.population = ConfigDict()
  c.population.per_device = 1  # members at each position of the mesh's axis
  # Other axes of the mesh that divide a member's rows, e.g. ("fsdp",).
  c.population.rows_over = ()
  # True: all start from one model, as they do from config.initial_params.
  c.population.same_init = False
  c.population.same_order = False  # True: they share one pass over the data
  # REPAIR of the averages that members of papa become, with its variants all
  # and pair, by the rows that they see in that step: two forward passes.
  c.population.repair = False
  # One value a member, one for all, or (); see data.mixing.Mixing.
  c.population.mixup = ()  # alpha
  c.population.cutmix = ()  # alpha
  c.population.smoothing = ()  # fraction of each label
  c.population.erasing = ()  # probability

  c.data = ConfigDict()  # see distrain_jax.data.load; None: its default
  c.data.name = config_dict.placeholder(str)  # `build` needs one
  c.data.folder = config_dict.placeholder(str)
  c.data.length = config_dict.placeholder(int)  # tokens a row, of text
  c.data.image_size = config_dict.placeholder(int)
  c.data.validation_fraction = config_dict.placeholder(float)
  c.data.max_records = config_dict.placeholder(int)  # of each split
  c.data.augment = ()  # e.g. ("pad_crop:4", "flip")
  c.data.in_memory = False  # decode everything once, now

  # A config file sets it: model_config(name, options of models.create).
  c.model = ConfigDict()
  # A safetensors file of the model's parameters, from `models.weights.save` or
  # launch/convert_weights.py, in any float dtype; "": random ones.
  c.initial_params = ""
  c.loss = ConfigDict()  # options of the task's loss, e.g. label_smoothing
  # BatchNorm's statistics across workers: averaged, local or synchronised;
  # see distrain_jax.stateful. Models without such state ignore it.
  c.stats = "averaged"

  c.optimizer = ConfigDict()
  # sgd, momentum, adam, adamw; in muP mulo, mup_adamw, mup_sgd
  c.optimizer.name = "adamw"
  # The peak. Of mulo it multiplies a step that is learned, size included: 1.
  # Of mup_adamw the steps of hidden matrices are over their fan in: try 0.03.
  c.optimizer.learning_rate = 1e-3
  # constant, step, linear or cosine, after warm-up
  c.optimizer.schedule = "cosine"
  # Of step: when the rate falls to a tenth, as fractions of the run.
  c.optimizer.drops = (0.5, 0.75)
  c.optimizer.warmup_steps = 0  # linear, from 0
  c.optimizer.final_fraction = 0.0  # of the peak, at the last step
  c.optimizer.momentum = 0.9  # of momentum and mup_sgd
  c.optimizer.nesterov = False  # of momentum and mup_sgd
  c.optimizer.b1 = 0.9  # of adam, adamw and mup_adamw
  c.optimizer.b2 = 0.999  # of adam, adamw and mup_adamw
  c.optimizer.eps = 1e-8  # of adam, adamw and mup_adamw
  # Of those in muP, whose model must be too (config.model.mup=True). False:
  # multipliers are 1, in any model, and mulo's weights those made for that.
  c.optimizer.mup = True
  # Of mulo: a file that launch/meta_train.py wrote; "": the shipped weights.
  c.optimizer.theta = ""
  c.optimizer.implementation = "tiled"  # of mulo; see learned.mulo
  # Of mulo, elements at once; None: 4096 on a CPU, 2**20 on accelerators.
  c.optimizer.tile = config_dict.placeholder(int)
  c.optimizer.weight_decay = 0.0  # on matrices and kernels, not on vectors

  c.evaluation = ConfigDict()
  c.evaluation.every = 200  # steps; 0: only at the end
  c.evaluation.batch_size = 256  # global
  c.evaluation.split = "validation"  # watched during the run; test at the end
  # Training batches from which BatchNorm's statistics are estimated anew for
  # the model that is evaluated; 0: it has the running averages.
  c.evaluation.recalibrate = 0
  # At the end also score the workers' own models, where the method trains
  # different ones (mean, worst and best), the ensembles of their probabilities
  # and of their logits, and of a population the greedy soup (2N - 1 passes over
  # the validation split) and how far the members are apart.
  c.evaluation.members = False

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 200  # steps; 0: only at the end and when interrupted
  c.checkpoint.keep = 2  # the latest ones
  c.checkpoint.keep_best = 1  # by the evaluation's loss

  c.log = ConfigDict()
  c.log.every = 10  # steps between lines of metrics.jsonl
  c.log.tensorboard = False  # events under the run's folder
  c.log.wandb = ""  # a Weights & Biases project; "": off

  c.bad_step = ConfigDict()
  # A step is bad when its loss or gradient norm is not finite, or its loss is
  # above `spike` times the running mean.
  c.bad_step.action = "stop"  # or skip: no worker applies it; it is counted
  c.bad_step.spike = 0.0  # 0: only what is not finite

  c.profile = ConfigDict()
  c.profile.start = 0  # first step of the profiler's window; 0: none
  c.profile.steps = 3

  # Folder of XLA's persistent compilation cache; "": off. It lets a resumed or
  # repeated run start at once.
  c.compilation_cache = "~/.cache/distrain_jax/xla"
  return c


def model_config(name: str, **options: Any) -> ConfigDict:
  """`config.model` for a model: all of its options as fields.

  Args:
    name: as `models.create` takes it.
    **options: those that are set; the others keep the model's own defaults,
      and can be set on the command line, e.g. --config.model.layers=2.

  Raises:
    ValueError: for an unknown model or option.
  """
  c = ConfigDict({"name": name})
  for option, hint in models.option_types(name).items():
    c[option] = config_dict.placeholder(_field_type(hint))
  for option, value in options.items():
    if option not in c:
      raise ValueError(
        f"config.model.{option}: {name} has no such option. "
        + suggest(option, set(c) - {"name"})
      )
    c[option] = value
  return c


def quick_or(steps: int, arg: str | None) -> int:
  """A config's number of steps: 20 with the argument `:quick`.

  Raises:
    ValueError: for any other argument.
  """
  if arg not in (None, "quick"):
    raise ValueError(
      f"This config file takes the argument :quick, or none; got :{arg}."
    )
  return 20 if arg == "quick" else steps


def import_config(path: str, *, beside: str) -> ModuleType:
  """Another config file, to start from.

  Config files are given by path and belong to no package, so that one cannot
  import another by its name.

  Args:
    path: of the file, as seen from the folder of `beside`.
    beside: the file that asks: `__file__`.
  """
  file = (Path(beside).parent / path).resolve(strict=True)
  spec = importlib.util.spec_from_file_location(f"{file.stem}_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def method_options() -> dict[str, Any]:
  """All options of all methods, as unset fields of the right type."""
  fields: dict[str, Any] = {}
  for factory in methods.FACTORIES.values():
    hints = typing.get_type_hints(factory)
    for name in options_of(factory):
      fields[name] = config_dict.placeholder(_field_type(hints[name]))
  return fields


def default_of(factory, option: str) -> Any:
  """The default value of a factory's keyword-only option."""
  return inspect.signature(factory).parameters[option].default


def takes(factory, option: str) -> bool:
  """Whether a factory has such an option."""
  return option in inspect.signature(factory).parameters


def suggest(given: str, known: Iterable[str]) -> str:
  """'Did you mean ...? It is one of ...' for the end of a message."""
  known = sorted(known)
  near = difflib.get_close_matches(str(given), known, n=1)
  hint = f"Did you mean {near[0]!r}? " if near else ""
  return f"{hint}It is one of {', '.join(known)}."


def options_of(factory) -> list[str]:
  """Keyword-only options of a factory that a config may set."""
  parameters = inspect.signature(factory).parameters.values()
  return [
    p.name
    for p in parameters
    if p.kind is p.KEYWORD_ONLY and p.name not in OWN_OPTIONS
  ]


def _field_type(hint) -> type:
  """bool, int, float or str; dtypes and choices are given as strings."""
  if typing.get_origin(hint) is tuple:
    return tuple
  kinds = typing.get_args(hint) or (hint,)
  some = [kind for kind in kinds if kind is not type(None)]
  if all(tuple in (kind, typing.get_origin(kind)) for kind in some):
    return tuple
  for kind in (bool, int, float):
    if kind in kinds and str not in kinds:
      return kind
  return str
