"""launch/compile.py as a user meets it: a report, a table, and refusals.

Importing takes longer than most of these commands, so they are forked from one
process that has imported everything and started nothing.
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from distrain_jax.inspect.table import UNITS

ROOT = Path(__file__).parents[2]
DIGITS = "--config=configs/digits.py"
SLICE = "--topology=v5e:2x4"
COMMANDS = {
  "report": [DIGITS, SLICE],
  "larger": [DIGITS, SLICE, "--config.batch_size=512"],
  "compare": [
    DIGITS,
    SLICE,
    "--compare=ddp,zero1",
    "--config.method.param_dtype=bfloat16",
  ],
  "halves": [
    DIGITS,
    SLICE,
    "--compare=fsdp,acco",
    "--config.method.name=acco",
    "--config.method.accumulate=2",
  ],
  "no halves": [DIGITS, SLICE, "--compare=fsdp,acco"],
  "devices": [f"{DIGITS}:quick", "--devices=4"],
  "no room": [
    DIGITS,
    "--topology=v5e:1x1",
    "--config.batch_size=67108864",
    "--compare=ddp",
  ],
  "no data": [
    DIGITS,
    "--topology=v5e:2x2",
    "--config.data.name=cifar10",
    "--config.model.widths=(64,)",
  ],
  "nowhere": [DIGITS],
  "twice": [DIGITS, SLICE, "--devices=8"],
  "topology": [DIGITS, "--topology=v5f:2x4"],
  "shape": [DIGITS, "--topology=v5e:2x4x4"],
  "method": [DIGITS, SLICE, "--compare=ddp,zero2"],
  "batch": [DIGITS, "--topology=v5e:4x4", "--config.batch_size=100"],
  "option": [DIGITS, SLICE, "--config.method.param_dtype=bfloat16"],
  "data": [DIGITS, SLICE, "--config.data.name=tfds:nowhere"],
  "field": [DIGITS, SLICE, "--config.batch_sise=3"],
  "argument": [DIGITS, SLICE, "compare"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("compile")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  commands = {}
  for name, arguments in COMMANDS.items():
    commands[name] = [
      str(ROOT / "launch" / "compile.py"),
      *(a.replace("configs/", f"{ROOT}/configs/") for a in arguments),
    ]
    if name != "devices":  # that one finds its own folder
      commands[name].append(f"--out={folder / name}")
  return run_launchers(
    commands,
    folder,
    "import distrain_jax.train, distrain_jax.inspect, distrain_jax.models\n"
    "import sklearn.datasets, matplotlib.figure, tensorflow_datasets",
  )


def kept(folder, name):
  return json.loads((folder / name / "report.json").read_text())


def is_picture(path):
  with Image.open(path) as image:
    image.load()
    return image.format == "PNG" and min(image.size) > 300


def test_a_report_is_printed_kept_and_drawn(ran, folder):
  code, out, err = ran("report")
  assert code == 0, err
  assert out.startswith("ddp on v5e:2x4, 8 devices (compiled in ")
  assert "Model, not measurement: v5e" in out
  assert "[1/1] compiling ddp for v5e:2x4 ..." in err
  found = kept(folder, "report")
  (report,) = found["reports"]
  assert f"{report['memory']['peak']:,}" in out
  assert (report["name"], report["hardware"]) == ("ddp", "v5e:2x4")
  assert found["config"]["batch_size"] == 128
  assert found["config_file"].endswith("configs/digits.py")
  assert found["data"]["shape"] == [8, 8, 1]
  assert found["assumed"] == []
  assert {"jax", "libtpu", "distrain-jax"} <= found["versions"].keys()
  assert is_picture(folder / "report" / "report.png")


def test_the_program_is_the_training_step_of_the_config(ran, folder):
  assert ran("report")[0] == ran("larger")[0] == 0
  (small,) = kept(folder, "report")["reports"]
  (large,) = kept(folder, "larger")["reports"]
  flops = [sum(x["flops"].values()) for x in (small, large)]
  # The MLP 64-128-128-10; its first layer's inputs need no gradient.
  a_row = 2 * (2 * 64 * 128 + 3 * 128 * 128 + 3 * 128 * 10)
  assert flops == [16 * a_row, 64 * a_row]
  params = 4 * (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)
  state = small["memory"]["state"]
  assert state["params"] == params and "guard" in state
  # Of the gradients, the loss, the accuracy and what the guard asks for.
  ring = 2 * (8 - 1) / 8 * params
  assert ring < small["wire_bytes"] < 1.01 * ring


def test_compared_methods_are_rows_that_equal_their_reports(ran, folder):
  code, out, err = ran("compare")
  assert code == 0, err
  assert "ddp has no option param_dtype: compared without it" in err
  lines = [x.replace(" *", "") for x in out.splitlines()]
  rows = [x.split() for x in lines if "  v5e:2x4  " in x]
  reports = kept(folder, "compare")["reports"]
  assert [row[0] for row in rows] == [r["name"] for r in reports]
  assert [row[0] for row in rows] == ["ddp", "zero1"]
  assert "A worker's micro-batches a step: 1 of 16 rows on v5e:2x4.\n" in out
  head = next(x for x in lines if x.startswith("method "))
  units = [1024 ** UNITS.index(u) for u in re.findall(", (.?i?B)", head)]
  for row, r in zip(rows, reports):
    held = sum(r["memory"]["state"].values())
    sizes = (r["memory"]["peak"], held, r["wire_bytes"])
    assert row[2:5] == [f"{n / unit:,.2f}" for n, unit in zip(sizes, units)]
    assert row[6] == f"{1e6 * r['model']['step_seconds']:.2f}"
    assert row[-1] == "yes"
  params = [r["memory"]["state"]["params"] for r in reports]
  assert params[0] == 2 * params[1]
  assert is_picture(folder / "compare" / "report.png")


@pytest.mark.parametrize(
  ("name", "micro", "said"),
  [
    ("halves", 4, "4 of 4 rows on v5e:2x4; acco: 2 in each half."),
    ("no halves", 2, "2 of 8 rows on v5e:2x4; acco: 1 in each half."),
  ],
)
def test_methods_of_halves_are_compared_on_the_same_micro_batches(
  name, micro, said, ran, folder
):
  code, out, err = ran(name)
  assert code == 0, err
  assert f"A worker's micro-batches a step: {said}" in out
  assert f"fsdp with accumulate={micro}: {micro} micro-batches, as all" in err
  assert "acco with" not in err  # as the config says, or by default
  found = kept(folder, name)
  fsdp, acco = found["reports"]
  assert (fsdp["name"], acco["name"]) == ("fsdp", "acco")
  # FSDP gathers in every micro-batch: the six leaves, but the last that nothing
  # divides. ACCO, unsliced or in one slice, once in each half.
  runs = lambda r: [
    c["runs"] for c in r["collectives"] if c["kind"] == "all-gather"
  ]
  assert set(runs(fsdp)) == {micro} and runs(acco) == [2]
  flops = [sum(r["flops"].values()) for r in (fsdp, acco)]
  assert flops[0] == flops[1] > 0
  assert found["micro_batches"] == micro


def test_simulated_devices_have_no_times(ran, folder):
  code, out, err = ran("devices")
  assert code == 0, err
  assert "ddp on cpu:4, 4 devices" in out and "no times" in out
  found = kept(folder, "runs/compile/digits-quick-cpu-4")
  assert found["reports"][0]["chip"] is None
  assert found["reports"][0]["model"]["step_seconds"] == 0
  assert is_picture(folder / "runs/compile/digits-quick-cpu-4/report.png")


def test_a_program_without_room_is_told_and_kept(ran, folder):
  code, out, err = ran("no room")
  assert code == 0, err
  assert "ddp on v5e:1x1 was refused: " in out and "memory" in out
  (report,) = kept(folder, "no room")["reports"]
  assert report["refused"] in out
  assert not (folder / "no room" / "report.png").exists()


def test_data_that_is_not_there_is_not_needed(ran, folder):
  code, _, err = ran("no data")
  assert code == 0, err
  assert kept(folder, "no data")["data"]["shape"] == [32, 32, 3]


MESSAGES = {
  "nowhere": "--topology=v5e:2x4 (several with commas), or --devices=8",
  "twice": "one of the two",
  "topology": "topology 'v5f:2x4': 'v5f' is no chip",
  "shape": "For example v5e:2x4 or v5e:16x16",
  "method": "--compare: 'zero2' is no method. Did you mean 'zero1'?",
  "batch": "multiple of the 16 workers of config.mesh={'data': 16}",
  "option": "config.method.param_dtype='bfloat16', but ddp has no such option",
  "data": "nothing says the size of its images. Set it, "
  "--config.data.image_size=N",
  "field": "batch_sise Did you mean batch_size",
  "argument": "unknown arguments: ['compare']",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_told_before_anything_compiles(name, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in out + err
  assert "Traceback" not in out + err
  assert "compiling" not in err
  assert not (folder / name).exists()
