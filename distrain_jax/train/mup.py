"""What a config's optimizer in muP has to know of its model.

See `learned.mup`. Multipliers are absolute, 1 / fan in, as the shipped weights
of mulo want them; so rates of mup_adamw are larger than adamw's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from distrain_jax import learned, models
from distrain_jax.learned import storage

NAMES = ("mulo", "mup_adamw", "mup_sgd")
USUAL = 1e-3  # config.optimizer.learning_rate, of Adam's steps


def check(c: ConfigDict) -> None:
  """Refuses a config whose optimizer and model do not fit together.

  Raises:
    ValueError: naming the field, its value, the rule and a way out.
  """
  o, name = c.optimizer, c.optimizer.name
  if o.theta and name != "mulo":
    raise ValueError(
      f"config.optimizer.theta={o.theta!r} are weights of mulo, but "
      f"config.optimizer.name={name!r}. Set it to '', or choose mulo."
    )
  if name == "mulo" and o.learning_rate == USUAL:
    raise ValueError(
      f"config.optimizer.learning_rate={USUAL} multiplies the step of mulo, "
      "which has learned how far to go. Set --config.optimizer.learning_rate=1 "
      "for its own steps."
    )
  under = name in NAMES and o.mup
  if name == "mup_adamw" and under and o.learning_rate == USUAL:
    raise ValueError(
      f"config.optimizer.learning_rate={USUAL} is of adamw: steps of mup_adamw "
      "on hidden kernels are divided by their fan in. Try "
      "--config.optimizer.learning_rate=0.03."
    )
  if not c.model.get("name"):
    return
  if c.model.get("mup") and not under:
    off = " with config.optimizer.mup=False" if name in NAMES else ""
    raise ValueError(
      f"config.model.mup=True builds {c.model.name!r} in muP, but "
      f"config.optimizer.name={name!r}{off} steps as without. Set "
      "--config.model.mup=False, or choose mup_adamw, mup_sgd or mulo with "
      "--config.optimizer.mup=True."
    )
  # Reversible ones have the field of what they are made from, and refuse it.
  can = "mup" in models.valid_options(c.model.name)
  can = can and not c.model.name.startswith("rev_")
  if under and not (can and c.model.get("mup")):
    build = "set --config.model.mup=True" if can else "choose another model"
    raise ValueError(
      f"config.optimizer.name={name!r} steps as muP does, but the model "
      f"{c.model.name!r} is not built in it: {build}, or "
      "--config.optimizer.mup=False for multipliers of 1 in any model."
    )


def info(c: ConfigDict, model: nn.Module, inputs: Any) -> Any:
  """`learned.mup_info` of a model, for optimizers that use it; else None.

  With config.optimizer.mup=False multipliers are 1, and only the number of
  leading axes that hold layers is known of a parameter.

  Args:
    c: the config.
    model: of it.
    inputs: of the model, as shapes.
  """
  if c.optimizer.name not in NAMES:
    return None
  params = models.zoo.abstract(model, inputs).params
  names = models.logical_names(model, inputs)
  found = learned.mup_info(params, names=names)
  if c.optimizer.mup:
    return found
  fixed = lambda x: dataclasses.replace(x, kind="fixed")
  return jax.tree.map(fixed, found)


def layers(model: nn.Module, inputs: Any) -> Any:
  """Of each parameter, how many leading axes hold layers: 0 or 1."""
  is_names = lambda x: isinstance(x, tuple)
  count = lambda names: int("layers" in names[:1])
  names = models.logical_names(model, inputs)
  return jax.tree.map(count, names, is_leaf=is_names)


def build(c: ConfigDict, rate: Any, decay: Any, mup: Any) -> Any:
  """The transform of `config.optimizer`, one of `NAMES`.

  Args:
    c: `config.optimizer`.
    rate: the schedule.
    decay: the transform that adds weight decay, which muP does not multiply.
    mup: of `info`.

  Raises:
    ValueError: a missing mup; a theta that is not mulo's.
    FileNotFoundError: no such file of theta.
  """
  if mup is None:
    raise ValueError(
      f"config.optimizer.name={c.name!r} needs to know which axes of the "
      "parameters grow with the width, from their logical names. A model "
      "without names: build an Experiment by hand, with "
      "learned.mulo(mup=learned.mup_info(params, other=...))."
    )
  if c.name == "mulo":
    # Without muP, the shipped weights are those that were made without.
    stacked = jax.tree.map(lambda x: x.stacked, mup)
    own = {"mup": mup} if c.mup else {"stacked": stacked}
    core = [learned.scale_by_mulo(**own, **options(c))]
  elif c.name == "mup_adamw":
    adam = optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps)
    core = [adam, learned.scale_by_mup(mup)]
  else:
    core = [learned.scale_by_mup(mup, "gradient")]
  if c.weight_decay:
    core.append(decay)
  if c.name == "mup_sgd" and c.momentum:
    core.append(optax.trace(c.momentum, c.nesterov))
  return optax.chain(*core, optax.scale_by_learning_rate(rate))


def options(c: ConfigDict) -> dict[str, Any]:
  """Those of `scale_by_mulo` that config.optimizer and its file decide.

  Raises:
    ValueError: a file that is no theta, or one that was made in the other
      parametrisation.
    FileNotFoundError: no such file.
  """
  chosen = {"implementation": c.implementation, "tile": c.tile}
  if not c.theta:
    return chosen
  path = Path(c.theta).expanduser()
  if not path.is_file():
    raise FileNotFoundError(
      f"config.optimizer.theta={c.theta!r}: no such file. launch/meta_train.py "
      "writes one, theta.safetensors in its folder; '' are the shipped weights."
    )
  theta, metadata = learned.load_theta(path)
  made = storage.made_with(str(path), metadata)
  if made.mup is not None and made.mup != bool(c.mup):
    raise ValueError(
      f"config.optimizer.theta={c.theta!r} was made "
      f"{'under' if made.mup else 'without'} muP, but config.optimizer.mup="
      f"{c.mup}. Set --config.optimizer.mup={made.mup} and "
      f"--config.model.mup={made.mup}, or choose a file that fits."
    )
  return {"theta": theta, **made.options, **chosen}
