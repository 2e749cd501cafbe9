r"""Turns text into token shards, once, for data.name='tokens'.

  python launch/prepare_data.py --out=data/notes notes/ more.txt
  python launch/prepare_data.py --out=data/alpaca alpaca.json \
      --tokenizer=tokenizer.json \
      --template='Task: {instruction}\n\nInput: {input}\n\nAnswer: {output}'
  python launch/prepare_data.py --out=data/fineweb fineweb/*.parquet \
      --tokenizer=tokenizer.json
  python launch/prepare_data.py --out=data/stories stories.txt \
      --separator='<|endoftext|>' --train_bpe=4096

Inputs: files, folders (every file below) and patterns ('src/**/*.py') of plain
text (.txt or any other ending, UTF-8, a document a file), .jsonl, .json,
.parquet, text and JSON also .gz; or tfds:NAME[:SPLIT], a TFDS data set on
disk. A hash of each document puts it into the train, validation or test part.
The folder appears when it is whole.

Then: python launch/train.py --config=configs/text.py --workdir=DIR \
    --config.data.name=tokens --config.data.folder=data/notes
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence

from tqdm import tqdm

from distrain_jax.data import documents as docs
from distrain_jax.data import preparing as prep
from distrain_jax.data.tokenizer import (
  byte_tokenizer,
  load_tokenizer,
  train_bpe,
)


def parser() -> argparse.ArgumentParser:
  """The flags; their help is the reference."""
  p = argparse.ArgumentParser(
    prog="prepare_data.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = p.add_argument
  add(
    "inputs",
    nargs="+",
    metavar="INPUT",
    help="file, folder, pattern, tfds:NAME",
  )
  add("--out", required=True, help="the folder to make")
  texts = p.add_mutually_exclusive_group()
  texts.add_argument(
    "--field", default="text", help="of objects and rows: NAME[,NAME...]"
  )
  texts.add_argument(
    "--template",
    metavar="TEXT",
    help="with fields in braces, \\n for newlines; paragraphs whose fields are "
    "empty are left out",
  )
  add("--separator", help="cuts text files into documents; \\n means newline")
  add("--tokenizer", default="byte", help="byte, or a tokenizer.json")
  add("--end_token", help="of the tokenizer; closes documents")
  add(
    "--train_bpe", type=int, metavar="SIZE", help="learn a BPE of SIZE tokens"
  )
  add(
    "--train_bpe_documents",
    type=int,
    default=100_000,
    metavar="N",
    help="learn it from the first N training documents",
  )
  add("--validation", type=float, default=0.01, help="share of documents")
  add("--test", type=float, default=0.01, help="share of documents")
  add("--max_documents", type=int, metavar="N", help="stop after N")
  add("--shard_tokens", type=int, default=2**27, help="tokens a file")
  add("--tfds_dir", help="data_dir of TFDS inputs")
  add("--overwrite", action="store_true", help="replace --out at the end")
  return p


def documents(args: argparse.Namespace, show: bool):
  """All documents of the inputs, with a progress bar in input bytes."""
  paths = docs.inputs(args.inputs)
  total = sum(map(docs.size, paths)) or None
  # disable=None: no bar where the output is no terminal.
  bar = tqdm(
    total=total, unit="B", unit_scale=True, disable=None if show else True
  )
  lines = lambda text: text and text.replace("\\n", "\n")
  with bar:
    for path in paths:
      yield from docs.read(
        path,
        fields=args.field.split(","),
        template=lines(args.template),
        separator=lines(args.separator),
        folder=args.tfds_dir,
        advance=bar.update,
      )


def tokenizer(args: argparse.Namespace):
  """The tokenizer the flags ask for."""
  if args.train_bpe is not None:
    train = prep.training_part(
      documents(args, show=False), args.validation, args.test
    )
    some = itertools.islice(train, args.train_bpe_documents)
    return train_bpe(some, args.train_bpe)
  if args.tokenizer == "byte":
    return byte_tokenizer()
  return load_tokenizer(args.tokenizer, args.end_token)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; 2 and a message on bad input."""
  args = parser().parse_args(argv)
  try:
    docs.inputs(args.inputs)  # before anything is made
    metadata = prep.prepare(
      itertools.islice(documents(args, show=True), args.max_documents),
      args.out,
      functools.partial(tokenizer, args),
      validation=args.validation,
      test=args.test,
      shard_tokens=args.shard_tokens,
      overwrite=args.overwrite,
    )
  except (ValueError, OSError) as e:
    print(f"prepare_data.py: {e}", file=sys.stderr)
    return 2
  for name, s in metadata.splits.items():
    print(
      f"{name}: {s.documents:,} documents, {s.tokens:,} tokens, "
      f"{s.bytes / s.tokens:.2f} bytes a token"
    )
  print(f"{args.out}: {metadata.tokenizer}, {metadata.vocab_size:,} tokens")
  return 0


if __name__ == "__main__":
  sys.exit(main())
