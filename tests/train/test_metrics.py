"""What a run wrote, and where."""

import json
import math
import struct
import sys
import types

import pytest

from distrain_jax.train import read_metrics
from distrain_jax.train.metrics import MetricsWriter, NoMetrics

FLOATS = (0.1, 1 / 3, 2.5e-8, 1e30, 0.0)


def write(folder, steps, **options):
  with MetricsWriter(folder, **options) as writer:
    for step in steps:
      writer.write(step, {"loss": FLOATS[step % 5]})


def test_every_line_is_an_object_with_its_step(tmp_path):
  write(tmp_path, range(1, 4))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(x)["step"] for x in lines] == [1, 2, 3]
  assert read_metrics(tmp_path)[0] == {"step": 1, "loss": 1 / 3}


def test_a_line_is_on_disk_once_it_is_written(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_steps_that_are_taken_again_are_written_again_to_the_byte(tmp_path):
  for folder in ("whole", "resumed"):
    (tmp_path / folder).mkdir()
  write(tmp_path / "whole", range(1, 9))
  write(tmp_path / "resumed", range(1, 7))
  write(tmp_path / "resumed", range(5, 9), resume_at=4)
  whole, resumed = (
    (tmp_path / folder / "metrics.jsonl").read_bytes()
    for folder in ("whole", "resumed")
  )
  assert whole == resumed


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
  write(tmp_path, range(1, 4))
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-5])
  assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]
  write(tmp_path, [3], resume_at=3)  # and is not in the way
  assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_new_run_begins_an_empty_file(tmp_path):
  write(tmp_path, range(1, 4))
  write(tmp_path, [])
  assert read_metrics(tmp_path) == []


def test_numbers_that_are_not_finite_survive(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
  (line,) = read_metrics(tmp_path)
  assert math.isnan(line["loss"])
  assert line["grad_norm"] == math.inf


def test_no_file_is_no_lines(tmp_path):
  assert read_metrics(tmp_path) == []


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with NoMetrics() as writer:
    writer.write(1, {"loss": 0.5})
  assert not list(tmp_path.iterdir())


def tensorboard_scalars(folder):
  """(tag, step, value) of the event files, read by hand.

  A TFRecord is a length (8 bytes), its checksum (4), the data and its checksum
  (4). Event: field 2 the step, field 5 the summary; Value: 1 the tag, 2 a float.
  """
  out = []
  for path in folder.glob("events.out.tfevents.*"):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = fields(data[12 : 12 + length])
      data = data[16 + length :]
      for value in (fields(v) for v in fields(event.get(5, b"")).values()):
        (number,) = struct.unpack("<f", value[2])
        out.append((value[1].decode(), event.get(2, 0), number))
  return out


def fields(message):
  """Number -> value of one protocol-buffer message, of the types above."""
  out, at = {}, 0

  def varint():
    nonlocal at
    number = shift = 0
    while True:
      byte = message[at]
      at += 1
      number |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return number

  while at < len(message):
    key = varint()
    kind = key & 7
    if kind == 0:
      out[key >> 3] = varint()
    else:
      size = {1: 8, 5: 4}.get(kind) or varint()
      out[key >> 3] = message[at : at + size]
      at += size
  return out


def test_tensorboard_gets_the_same_numbers(tmp_path):
  pytest.importorskip("tensorboardX", reason="of the extra tensorboard")
  write(tmp_path, [1, 2], tensorboard=True)
  got = tensorboard_scalars(tmp_path)
  assert [x[:2] for x in got] == [("loss", 1), ("loss", 2)]
  assert [x[2] for x in got] == pytest.approx([1 / 3, 2.5e-8])


@pytest.fixture
def wandb(monkeypatch):
  """A module in the place of wandb, which notes what it is called with."""
  calls = []

  class Run:
    def log(self, values, step):
      calls.append(("log", step, values))

    def finish(self):
      calls.append(("finish",))

  def init(**options):
    calls.append(("init", options))
    return Run()

  module = types.ModuleType("wandb")
  module.init = init
  monkeypatch.setitem(sys.modules, "wandb", module)
  return calls


def test_weights_and_biases_goes_on_with_the_folders_run(tmp_path, wandb):
  folder = tmp_path / "mine"
  folder.mkdir()
  write(folder, [1, 2], wandb="project", config={"steps": 2})
  options = wandb[0][1]
  assert options["project"] == "project"
  assert options["config"] == {"steps": 2}
  assert (options["id"], options["resume"]) == ("mine", "allow")
  assert wandb[1:] == [
    ("log", 1, {"loss": FLOATS[1]}),
    ("log", 2, {"loss": FLOATS[2]}),
    ("finish",),
  ]


@pytest.mark.parametrize(
  "module, options, message",
  [
    (
      "tensorboardX",
      {"tensorboard": True},
      r"config\.log\.tensorboard needs the package tensorboardX: pip install "
      r"'distrain-jax\[tensorboard\]'",
    ),
    (
      "wandb",
      {"wandb": "project"},
      r"config\.log\.wandb needs the package wandb: pip install "
      r"'distrain-jax\[wandb\]'",
    ),
  ],
)
def test_a_missing_package_says_how_to_get_it(
  module, options, message, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=message):
    MetricsWriter(tmp_path, **options)
