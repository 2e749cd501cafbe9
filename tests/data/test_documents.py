"""Documents are read as written from every format, and errors say where."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain_jax.data import documents

ROWS = [{"text": f"élan {i}\nline", "title": f"T{i}"} for i in range(9)]
WANT = [row["text"] for row in ROWS]


def write(path, rows=ROWS):
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
  if path.name.startswith("list"):
    raw = json.dumps(rows)
  else:
    raw = "".join(json.dumps(row) + "\n\n" for row in rows)
  data = raw.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return str(path)


FILES = ["a.jsonl", "a.ndjson", "a.jsonl.gz", "list.json", "a.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_the_documents_and_all_progress(tmp_path, name):
  path, used = write(tmp_path / name), []
  got = list(documents.read(path, advance=used.append))
  assert got == WANT
  assert sum(used) == pytest.approx(documents.size(path))


@pytest.mark.parametrize("name", FILES)
def test_fields_are_joined_and_empty_ones_left_out(tmp_path, name):
  rows = [{"a": "one", "b": None, "c": "two"}, {"a": "", "b": "x", "c": ""}]
  path = write(tmp_path / name, rows)
  got = list(documents.read(path, fields=("c", "b", "a")))
  assert got == ["two\n\none", "x"]


TASK = "Do it.\n\nTask: {ask} ({{x}})\n\nGiven:\n{given}\n\nAnswer: {say}!{ask}"


@pytest.mark.parametrize("name", FILES)
def test_a_template_is_filled_and_paragraphs_without_text_left_out(
  tmp_path, name
):
  rows = [
    {"ask": "Add {1}.", "given": "1\n\n2", "say": "3"},
    {"ask": "Say so.", "given": None, "say": ""},
    {"ask": "", "given": "", "say": None},
  ]
  path = write(tmp_path / name, rows)
  assert list(documents.read(path, template=TASK)) == [
    "Do it.\n\nTask: Add {1}. ({x})\n\nGiven:\n1\n\n2\n\nAnswer: 3!Add {1}.",
    "Do it.\n\nTask: Say so. ({x})\n\nAnswer: !Say so.",
    "",
  ]


@pytest.mark.parametrize(
  "template, message",
  [
    ("no field", "has no field, such as {text}"),
    ("{a", "expected '}'"),
    ("{}", "by name alone"),
    ("{a!r}", "by name alone"),
    ("{a:>3}", "by name alone"),
  ],
)
def test_a_template_that_cannot_be_read_is_refused(template, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    documents.read(write(tmp_path / "a.jsonl"), template=template)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_field_gets_a_suggestion(tmp_path, name):
  path = write(tmp_path / name)
  with pytest.raises(ValueError, match=r"Did you mean 'text'.*--field"):
    list(documents.read(path, fields=("texts",)))


@given(
  parts=st.lists(st.text(alphabet="aé\n-", max_size=5), min_size=1),
  separator=st.sampled_from(["--", "\n\n", "é"]),
)
def test_a_separator_cuts_text_as_split_does(
  tmp_path_factory, parts, separator
):
  text = separator.join(parts)
  path = tmp_path_factory.mktemp("text") / "a.txt"
  path.write_bytes(text.encode())
  got = list(documents.read(str(path), separator=separator))
  assert got == text.split(separator)
  assert list(documents.read(str(path))) == [text]


def test_characters_and_separators_may_lie_across_blocks(tmp_path):
  text = "é" * 2**19 + "é<cut>" + "a" * (2**20 - 4) + "<cut>" + "ü" * 2**20
  path = tmp_path / "a.txt.gz"
  path.write_bytes(gzip.compress(b"x" + text.encode(), 1))
  used = []
  read = documents.read(str(path), separator="<cut>", advance=used.append)
  assert list(read) == ("x" + text).split("<cut>")
  assert sum(used) == path.stat().st_size


def test_folders_are_read_by_name_without_hidden_files(tmp_path):
  for name in ("b/2.txt", "a.txt", ".git/config", "b/.x", "b/10.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  found = documents.inputs([str(tmp_path), "tfds:lm1b"])
  names = ["a.txt", "b/10.txt", "b/2.txt"]
  assert found == [*(str(tmp_path / n) for n in names), "tfds:lm1b"]
  found = documents.inputs([str(tmp_path / "**" / "*0.txt")])
  assert found == [str(tmp_path / "b/10.txt")]


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.txt", b"good\n\xff\xfe", "a.txt: not UTF-8 text"),
    ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2: not a JSON object"),
    ("a.jsonl", b'"just text"', "line 1: wanted an object, got 'just text'"),
    ("a.jsonl", b'{"text": 3}', "'text' is not text: '3'"),
    ("a.json", b"{", "a.json: not JSON"),
    ("a.json", b'{"text": "x"}', "holds dict, wanted a list.*jsonl"),
  ],
)
def test_broken_input_is_named_with_its_place(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(documents.read(str(tmp_path / name)))


def test_inputs_that_are_not_there_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file or folder"):
    documents.inputs([str(tmp_path / "none")])
  with pytest.raises(FileNotFoundError, match="No files in"):
    documents.inputs([str(tmp_path)])
