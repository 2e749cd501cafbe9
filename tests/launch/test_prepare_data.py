"""The command makes folders that `load` reads, and explains bad input."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from distrain_jax import data

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "prepare_data.py"
TEXTS = [f"Story {i}. " + "once upon a time " * (i % 5) for i in range(40)]
SHARES = ["--validation=0.25", "--test=0.25"]


@pytest.fixture(scope="module")
def main():
  spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


def write(folder, kind):
  if kind == "text":
    (folder / "in").mkdir()
    for i, text in enumerate(TEXTS):
      (folder / "in" / f"{i:02}.txt").write_text(text)
    return folder / "in"
  if kind == "separated":
    (folder / "in.txt").write_text("\n--\n".join(TEXTS))
    return folder / "in.txt"
  rows = [{"body": text} for text in TEXTS]
  if kind == "jsonl":
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "in.jsonl").write_text(lines)
    return folder / "in.jsonl"
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
  return folder / "in.parquet"


KINDS = {
  "text": [],
  "separated": ["--separator=\\n--\\n"],
  "jsonl": ["--field=body"],
  "parquet": ["--field=body"],
}


def documents(folder):
  d = data.load("tokens", folder=folder, length=8)
  texts = []
  for part in (d.train, d.validation, d.test):
    stream = part.stream.read(np.asarray([0]), len(part.stream))[0]
    texts += stream.tobytes().decode().split("\0")[:-1]
  return texts


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_becomes_the_same_tokens(main, tmp_path, capsys, kind):
  source, out = write(tmp_path, kind), tmp_path / "out"
  assert main([f"--out={out}", str(source), *KINDS[kind], *SHARES]) == 0
  assert sorted(documents(out)) == sorted(TEXTS)
  assert "train: " in capsys.readouterr().out


def test_a_template_makes_instructions_of_rows(main, tmp_path):
  rows = [{"ask": t, "given": "", "say": str(i)} for i, t in enumerate(TEXTS)]
  source, out = tmp_path / "in.json", tmp_path / "out"
  source.write_text(json.dumps(rows))
  template = r"Task:\n{ask}\n\nGiven:\n{given}\n\nAnswer: {say}"
  flags = [f"--template={template}", *SHARES]
  assert main([f"--out={out}", str(source), *flags]) == 0
  want = [f"Task:\n{t}\n\nAnswer: {i}" for i, t in enumerate(TEXTS)]
  assert sorted(documents(out)) == sorted(want)


def test_as_a_command_it_learns_a_tokenizer_and_refuses_to_overwrite(tmp_path):
  source, out = write(tmp_path, "jsonl"), tmp_path / "out"
  command = [sys.executable, str(SCRIPT), f"--out={out}", str(source)]
  command += ["--field=body", "--train_bpe=280", *SHARES]
  run = lambda: subprocess.run(
    command, capture_output=True, text=True, timeout=120
  )
  first = run()
  assert first.returncode == 0, first.stderr
  d = data.load("tokens", folder=out, length=8)
  assert 257 < d.info.vocab_size <= 280 and d.info.bytes_per_token > 1.5
  assert (out / "tokenizer.json").is_file()
  second = run()
  assert second.returncode == 2 and "--overwrite" in second.stderr


def test_max_documents_stops_early(main, tmp_path):
  source, out = write(tmp_path, "jsonl"), tmp_path / "out"
  flags = ["--field=body", "--max_documents=20", *SHARES]
  assert main([f"--out={out}", str(source), *flags]) == 0
  assert sorted(documents(out)) == sorted(TEXTS[:20])


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--field=text"], "no field 'text'"),
    (["--field=body", "--tokenizer=none.json"], "no such file"),
    (["--field=body", "--train_bpe=9"], "at least 257"),
    (["--field=body", "--test=0"], "--test=0"),
    (["--field=body", "--max_documents=1"], "each needs one at least"),
  ],
)
def test_bad_input_is_explained_and_leaves_nothing(
  main, tmp_path, capsys, flags, message
):
  source = write(tmp_path, "jsonl")
  out = tmp_path / "out"
  assert main([f"--out={out}", str(source), *SHARES, *flags]) == 2
  assert message in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_missing_input_is_explained_before_anything_is_made(
  main, tmp_path, capsys
):
  assert main([f"--out={tmp_path / 'out'}", str(tmp_path / "none")]) == 2
  assert "no such file or folder" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
