r"""Weights of GPT-Neo and Llama: from Hugging Face's form to ours, and back.

  python launch/convert_weights.py import gpt-neo-2.7B/ data/gpt_neo.safetensors
  python launch/train.py --config=configs/acco/paper_alpaca.py --workdir=DIR \
    --config.data.folder=data/alpaca \
    --config.initial_params=data/gpt_neo.safetensors
  python launch/convert_weights.py export data/gpt_neo.safetensors back/

Their form is a folder with config.json and one or several *.safetensors files,
with an index where there are several; ours one file of the trainer's parameter
tree, which also says what the model is. Values and dtypes stay as they are; no
more than one tensor is in memory. What training has made is written by
distrain_jax.models.weights.save(FILE, run.params(state), model=...), with
`model` as `import` shows it.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from distrain_jax.models import huggingface, weights


def parser() -> argparse.ArgumentParser:
  """The flags; their help is the reference."""
  p = argparse.ArgumentParser(
    prog="convert_weights.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  ways = p.add_subparsers(dest="way", required=True)
  one = ways.add_parser("import", help="a Hugging Face folder -> a file")
  one.add_argument("source", metavar="FOLDER")
  one.add_argument("out", metavar="FILE", help="to make, *.safetensors")
  two = ways.add_parser("export", help="a file -> a Hugging Face folder")
  two.add_argument("source", metavar="FILE")
  two.add_argument("out", metavar="FOLDER", help="to make")
  for way in (one, two):
    way.add_argument("--overwrite", action="store_true", help="replace it")
  return p


def to_file(source: str, out: str) -> dict:
  """`import`; the model's options."""
  model = huggingface.read(source)
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  weights.save(out, model.params, model.options)
  return model.options


def to_folder(source: str, out: str) -> dict:
  """`export`; the model's options."""
  options = weights.model_of(source)
  if options is None:
    raise ValueError(
      f"{source} does not say what model it is of. Write it again: "
      "distrain_jax.models.weights.save(path, params, model={'name': 'llama', "
      "...})."
    )
  like = huggingface.parameters(options)
  params = weights.load(source, like)
  huggingface.write(out, huggingface.Model(options, params))
  return options


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; 2 and a message on bad input."""
  args = parser().parse_args(argv)
  try:
    if pathlib.Path(args.out).exists() and not args.overwrite:
      raise FileExistsError(
        f"{args.out} exists. Pass --overwrite to replace it."
      )
    ways = {"import": to_file, "export": to_folder}
    options = ways[args.way](args.source, args.out)
  except (ValueError, OSError) as e:
    print(f"convert_weights.py: {e}", file=sys.stderr)
    return 2
  print(f"{args.out}: {json.dumps(options)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
