"""Documents from files: plain text, JSON lines, JSON, parquet, TFDS.

Each reader yields one text a document and tells how much of the input it has
used, for a progress bar. Nothing is held but the document at hand (JSON: the
file).
"""

import codecs
import glob
import gzip
import json
import os
import pathlib
import string
from collections.abc import Callable, Iterator, Sequence

from distrain_jax.data.source import did_you_mean

Advance = Callable[[float], object]  # bytes of input used since the last call


def inputs(paths: Sequence[str]) -> list[str]:
  """The files meant by files, folders (all below), patterns and tfds: names.

  A pattern is as in a shell, `**` any depth: "src/**/*.py". Files of a folder
  or a pattern come in the order of their names.

  Raises:
    FileNotFoundError: for a path that is not there, or no file at all.
  """
  found = []
  for path in paths:
    if path.startswith("tfds:"):
      found.append(path)
    elif os.path.isdir(path):
      found += _below(pathlib.Path(path))
    elif os.path.isfile(path):
      found.append(path)
    elif glob.has_magic(path):
      matches = sorted(glob.glob(path, recursive=True))
      found += [p for p in matches if os.path.isfile(p)]
    else:
      raise FileNotFoundError(f"Input {path!r}: no such file or folder.")
  if not found:
    raise FileNotFoundError(f"No files in {list(paths)}.")
  return found


def _below(folder: pathlib.Path) -> list[str]:
  """All files in a folder and its folders, but nothing hidden."""
  files = []
  for path in sorted(folder.rglob("*")):
    parts = path.relative_to(folder).parts
    if path.is_file() and not any(part.startswith(".") for part in parts):
      files.append(str(path))
  return files


def size(path: str) -> int:
  """Bytes of an input, for the progress bar's total."""
  return 0 if path.startswith("tfds:") else os.path.getsize(path)


def read(
  path: str,
  *,
  fields: Sequence[str] = ("text",),
  template: str | None = None,
  separator: str | None = None,
  folder: str | None = None,
  advance: Advance = lambda used: None,
) -> Iterator[str]:
  """The documents of one input, by its ending (a further .gz is unpacked).

  Args:
    path: `.jsonl` and `.ndjson`: an object a line; `.json`: a list of objects;
      `.parquet`: a row a document; `tfds:NAME` or `tfds:NAME:SPLIT`; else
      UTF-8 text, a document a file.
    fields: names in an object, row or record; more than one are joined by an
      empty line, empty ones left out.
    template: instead of fields, a text with fields in braces, such as
      "Question: {input}\\n\\nAnswer: {output}". A paragraph (between empty
      lines) all of whose fields are empty is left out.
    separator: cuts a text file into documents, e.g. "<|endoftext|>".
    folder: TFDS's data_dir.
    advance: called with the number of bytes of the file used.

  Raises:
    ValueError: for text that is not UTF-8, broken JSON, a missing field, with
      the file and the line or row; for a template that cannot be read.
  """
  form = [[("", f)] for f in fields] if template is None else _form(template)
  if path.startswith("tfds:"):
    return _tfds(path.removeprefix("tfds:"), form, folder)
  suffix = pathlib.Path(path.removesuffix(".gz")).suffix
  if suffix in (".jsonl", ".ndjson"):
    return _jsonl(path, form, advance)
  if suffix == ".json":
    return _json(path, form, advance)
  if suffix == ".parquet":
    return _parquet(path, form, advance)
  return _text(path, separator, advance)


def _open(path: str, file):
  return gzip.open(file) if path.endswith(".gz") else file


def _text(path, separator, advance):
  decoder = codecs.getincrementaldecoder("utf-8")()
  parts, before = [], 0
  with open(path, "rb") as file:
    opened = _open(path, file)
    while True:
      block = opened.read(2**20)
      try:
        parts.append(decoder.decode(block, final=not block))
      except UnicodeDecodeError as e:
        raise ValueError(
          f"{path}: not UTF-8 text ({e.reason}, in the MiB before byte "
          f"{opened.tell()}). Convert it, or leave it out of the input, e.g. "
          "by a pattern: 'DIR/**/*.txt'."
        ) from e
      if separator:
        *whole, rest = "".join(parts).split(separator)
        yield from whole
        parts = [rest]
      advance(file.tell() - before)
      before = file.tell()
      if not block:
        break
  yield "".join(parts)


def _jsonl(path, form, advance):
  before = 0
  with open(path, "rb") as file:
    for number, line in enumerate(_open(path, file), start=1):
      if line.strip():
        where = f"{path}, line {number}"
        try:
          record = json.loads(line)
        except ValueError as e:
          raise ValueError(f"{where}: not a JSON object ({e}).") from e
        yield _join(record, form, where)
      advance(file.tell() - before)  # of a .gz file: its compressed bytes
      before = file.tell()


def _json(path, form, advance):
  with open(path, "rb") as file:
    try:
      records = json.load(_open(path, file))
    except ValueError as e:
      raise ValueError(f"{path}: not JSON ({e}).") from e
  if not isinstance(records, list):
    raise ValueError(
      f"{path}: holds {type(records).__name__}, wanted a list of objects. For "
      "an object a line, call the file .jsonl."
    )
  for number, record in enumerate(records):
    yield _join(record, form, f"{path}, object {number}")
    advance(size(path) / len(records))


def _parquet(path, form, advance):
  from pyarrow import parquet

  with parquet.ParquetFile(path) as file:
    columns, fields = file.schema_arrow.names, _fields(form)
    for field in fields:
      if field not in columns:
        raise ValueError(_no_field(path, field, columns))
    each = size(path) / max(1, file.metadata.num_rows)
    for block in file.iter_batches(1024, columns=fields):
      for record in block.to_pylist():
        yield _join(record, form, path)
        advance(each)


def _tfds(name, form, folder):
  from distrain_jax.data import tfds_source

  name, _, split = name.partition(":")
  found = tfds_source.builder(name, folder)
  for row in tfds_source.rows(found, split or "train"):
    texts = {k: row[k] for k in row if isinstance(row[k], bytes | str)}
    yield _join(texts, form, f"tfds:{name}")


def _form(template: str) -> list[list[tuple[str, str | None]]]:
  """A template's paragraphs, each as (text, the field after it or None)."""
  paragraphs = []
  for paragraph in template.split("\n\n"):
    try:
      pieces = list(string.Formatter().parse(paragraph))
    except ValueError as e:
      raise ValueError(f"template {template!r}: {e}.") from e
    for _, field, *rest in pieces:
      if field == "" or any(rest):
        raise ValueError(
          f"template {template!r}: fields stand in braces by name alone, "
          "{input}; braces themselves are doubled."
        )
    paragraphs.append([(text, field) for text, field, *_ in pieces])
  if not _fields(paragraphs):
    raise ValueError(f"template {template!r} has no field, such as {{text}}.")
  return paragraphs


def _fields(form) -> list[str]:
  found = [field for pieces in form for _, field in pieces if field is not None]
  return list(dict.fromkeys(found))


def _join(record, form, where: str) -> str:
  """The text of a record's fields; absent values (null) count as empty."""
  if not isinstance(record, dict):
    raise ValueError(f"{where}: wanted an object, got {str(record)[:80]!r}.")
  texts: dict[str | None, str] = {}
  for field in _fields(form):
    if field not in record:
      raise ValueError(_no_field(where, field, record))
    text = record[field]
    text = text.decode() if isinstance(text, bytes) else text
    if not isinstance(text, str | None):
      raise ValueError(f"{where}: {field!r} is not text: {str(text)[:80]!r}.")
    texts[field] = text or ""
  if not any(texts.values()):
    return ""
  paragraphs = []
  for pieces in form:
    fields = [field for _, field in pieces if field is not None]
    if not fields or any(texts[field] for field in fields):
      filled = (text + texts.get(field, "") for text, field in pieces)
      paragraphs.append("".join(filled))
  return "\n\n".join(paragraphs)


def _no_field(where: str, field: str, known) -> str:
  return (
    f"{where}: no field {field!r}.{did_you_mean(field, known)} It has "
    f"{', '.join(sorted(known))}; choose with --field=NAME[,NAME...] or --template."
  )
