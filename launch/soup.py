r"""Soups of runs: members, ensembles and averages side by side, and a picture.

  python launch/soup.py runs/a runs/b runs/c --out=results
  python launch/soup.py runs/population --save=soup.safetensors --soup=uniform
  python launch/soup.py a.safetensors b.safetensors --config=configs/digits.py

Each source is a folder of launch/train.py, which gives its model, or all
members' models where its method trains different ones; or a file of
launch/export.py, which needs --config. The data is the first run's, or
--config's. Prints loss and accuracy on the validation and test split: of each
member, of ensembles of their probabilities and logits, of their average (with
BatchNorm's statistics as averaged, and estimated anew), of REPAIR where it
applies, and of the greedy soup, chosen on the validation split. Then how far
members are from their average, and the barriers of the loss between them.
Writes soup.json and soup.png; --save keeps one soup as a file that any run can
start from (--config.initial_params). One device does it all.
"""

import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distrain_jax import soups, spmd
from distrain_jax.soups import judging, picture, runs, trees
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoints; unset: latest.")
CPU = flags.DEFINE_bool("cpu", False, "On the CPU, whatever else is there.")
OUT = flags.DEFINE_string("out", "results", "Folder of soup.json, soup.png.")
SAVE = flags.DEFINE_string("save", None, "A file to make, *.safetensors.")
NAMES = ["uniform", "repair", "greedy"]
SOUP = flags.DEFINE_enum("soup", "greedy", NAMES, "Which one to --save.")
SCORE = flags.DEFINE_enum(
  "score",
  None,
  ["accuracy", "loss"],
  "Chooses the greedy soup; unset: accuracy for images, loss for text.",
)
BATCHES = flags.DEFINE_integer(
  "batches", 8, "Of training, for BatchNorm's statistics and REPAIR.", 1
)
EVAL_BATCHES = flags.DEFINE_integer(
  "eval_batches", 0, "The first so many of each split; 0: all.", 0
)
LEAVE = flags.DEFINE_list(
  "leave", [], "Members that are left out, by name, e.g. runs/population[2]."
)
POINTS = flags.DEFINE_integer("points", 11, "On each path.", 2)
LAYER_POINTS = flags.DEFINE_integer(
  "layer_points", 5, "On paths of single layers, first to second; 0: none.", 0
)
PAIRS = flags.DEFINE_enum(
  "pairs",
  None,
  ["all", "first"],
  "Paths between all members, or the first and each; unset: all of up to 4.",
)
DEPTH = flags.DEFINE_integer(
  "depth", 1, "Keys of a parameter's path that tell layers apart.", 1
)
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def main(argv) -> None:
  logging.set_verbosity(logging.WARNING)  # libraries tell of every file
  if CPU.value:
    spmd.use_cpu_devices(1)
  try:
    members, c = read(argv[1:])
    say(f"{len(members)} members")
    judge = judging.judge_of(
      c,
      next(iter(members.values())),
      batches=BATCHES.value,
      eval_batches=EVAL_BATCHES.value,
    )
    keep(mended(members, judge), c, judge)
  except (ValueError, FileNotFoundError, ImportError) as e:
    sys.exit(f"{type(e).__name__}: {e}")


def read(sources: list[str]) -> tuple[dict[str, Any], ConfigDict]:
  """Name -> model of all members; the config that they are judged by.

  Raises:
    ValueError: for a file without --config, a source given twice, fewer than
      two models, or models that are unlike or not finite.
  """
  c, members = CONFIG.value, {}
  if len(set(sources)) < len(sources):
    raise ValueError(f"{sources}: one is given twice. Name each once.")
  for source in sources:
    if source.endswith(".safetensors"):
      if CONFIG.value is None:
        raise ValueError(
          f"{source} does not say what data it is of. Add --config=FILE, the "
          "config that it was trained with."
        )
      members[source] = runs.from_weights(source, CONFIG.value)
      continue
    found = runs.read(source, STEP.value)
    c = c or found.config
    many = len(found.models) > 1
    for i, model in enumerate(found.models):
      members[f"{source}[{i}]" if many else source] = model
  for name in LEAVE.value:
    if name not in members:
      raise ValueError(f"--leave={name}: no such member of {list(members)}.")
    del members[name]
  if len(members) < 2:
    raise ValueError(
      f"a soup is made of two or more models; {len(members)} found in "
      f"{sources or 'no sources'}. Name more runs' folders, or one of a method "
      "that trains a population."
    )
  names = ", ".join(f"models[{i}] is {x}" for i, x in enumerate(members))
  try:
    trees.check("soup", list(members.values()))
  except ValueError as e:
    raise ValueError(f"{e} ({names}; --leave=NAME leaves one out.)") from e
  return members, c


def mended(members: dict[str, Any], judge: judging.Judge) -> dict[str, Any]:
  """Files have no statistics: theirs are estimated."""
  if not judge.has_statistics:
    return members
  files = [x for x in members if x.endswith(".safetensors")]
  for x in files:
    say(f"statistics of {x}: from {BATCHES.value} batches of training")
  return members | {x: judge.mend(members[x]) for x in files}


def text_of(rows: dict[str, judging.Scores]) -> str:
  """The table as text."""
  width = max(map(len, rows))
  columns = list(itertools.product(judging.SPLITS, ("accuracy", "loss")))
  head = "  ".join(f"{f'{split} {k}':>19}" for split, k in columns)
  lines = [f"{'':{width}}  {head}"]
  for name, scores in rows.items():
    cells = "  ".join(f"{scores[split][k]:19.4f}" for split, k in columns)
    lines.append(f"{name:{width}}  {cells}")
  return "\n".join(lines)


def pairs_of(names: list[str]) -> list[tuple[str, str]]:
  """Between which members paths lead."""
  first = PAIRS.value == "first" or (PAIRS.value is None and len(names) > 4)
  pairs = itertools.combinations(names, 2)
  return [(a, b) for a, b in pairs if not first or a == names[0]]


def keep(members: dict[str, Any], c: ConfigDict, judge: judging.Judge) -> None:
  """Prints and writes what is found."""
  models, names = list(members.values()), list(members)
  say("making soups ...")
  made = judging.cook(models, judge, SCORE.value or "")
  if SAVE.value and SOUP.value not in made.models:
    raise ValueError(f"--soup={SOUP.value} does not apply. {made.no_repair}")
  say("scoring ...")
  rows = judging.table(members, made, judge)
  chosen = [names[i] for i in made.greedy.chosen]
  print(text_of(rows))
  print(f"greedy soup of {', '.join(chosen)}")
  if made.no_repair:
    print(f"no {made.no_repair}")
  apart = soups.consensus_distance(models, depth=DEPTH.value)
  print(
    f"consensus distance: {apart.total.squared:.6g} squared, "
    f"{apart.total.relative:.4g} of the members' norm"
  )
  say("walking between members ...")
  paths, layers = judging.walk(
    dict(zip(short(names), models)),
    judge,
    pairs_of(short(names)),
    points=POINTS.value,
    layer_points=LAYER_POINTS.value,
    depth=DEPTH.value,
  )
  for name, along in paths.items():
    line, mean = (soups.barrier(along, x) for x in ("line", "mean"))
    print(f"barrier {name}: {line:.4g} over the line, {mean:.4g} over the mean")
  points = lambda x: {"t": x.t.tolist(), "loss": x.loss.tolist()}
  found = {
    "command": " ".join(["python launch/soup.py", *sys.argv[1:]]),
    "versions": {x: version(x) for x in PACKAGES}
    | {"python": platform.python_version()},
    "scores": rows,
    "greedy": {"chosen": chosen, "tried": made.greedy.tried},
    "consensus": {"all": apart.total._asdict()}
    | {k: x._asdict() for k, x in apart.by_layer.items()},
    "paths": {k: points(x) for k, x in paths.items()},
    "layer_paths": {k: points(x) for k, x in layers.items()},
  }
  folder = Path(OUT.value)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "soup.json").write_text(json.dumps(found, indent=1) + "\n")
  title = f"{c.model.name} on {c.data.name}, {len(models)} members"
  picture.draw(
    folder / "soup.png",
    paths=paths,
    layers=layers,
    consensus=apart,
    title=title,
    loss="validation loss",
  )
  print(f"wrote {folder / 'soup.json'} and {folder / 'soup.png'}")
  if SAVE.value:
    runs.save(SAVE.value, made.models[SOUP.value], c)
    print(f"wrote {SAVE.value}: the soup {SOUP.value}")


def short(names: list[str]) -> list[str]:
  """Without the folders above, for legends, if they then still differ."""
  last = [Path(name).name for name in names]
  return last if len(set(last)) == len(names) else names


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
