"""launch/pipeline_schedule.py as a user meets it: table, crossing, picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
COMMANDS = {
  "small": ["--stages=3", "--micro_batches=2", "--cross=3"],
  "cross": ["--cross=4,1"],
  "argument": ["petra"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "pipeline_schedule.py")
  commands = {
    name: [script, *arguments, f"--out={folder / name}"]
    for name, arguments in COMMANDS.items()
  }
  imports = "import distrain_jax.inspect, distrain_jax.models"
  return run_launchers(commands, folder, imports)


@pytest.fixture(scope="module")
def kept(ran, folder):
  code, _, err = ran("small")
  assert code == 0, err
  return json.loads((folder / "small" / "pipeline_schedule.json").read_text())


def test_times_are_the_formulas_where_stages_are_equal(kept):
  times = {name: x["time"] for name, x in kept["schedules"].items()}
  assert times == pytest.approx(
    {
      "PETRA": 4,
      "1F1B, graph kept": 3 * (1 + 2 / 2),
      # The last stage has nothing to compute again: 2 of 16 less.
      "1F1B, recomputed": 7,
      "1F1B, reversible": 7,
      "GPipe, graph kept": (3 + 2 * 3 + 2 * 2) / 2,
      "GPipe, recomputed": (3 + 4 * 3) / 2,
    }
  )
  formulas = [x["formula"] for x in kept["schedules"].values()]
  assert formulas == [4, 6, 8, 8, 6, 8]
  busy = {name: x["busy_passes"] for name, x in kept["schedules"].items()}
  assert busy["PETRA"] == 1.0
  assert busy["GPipe, recomputed"] == pytest.approx(2 / (2 + 2))
  assert busy["1F1B, reversible"] == pytest.approx(2 / (2 + 4))


def test_1f1b_overtakes_petra_where_the_formula_says(ran, kept):
  (found,) = kept["crossings"]
  assert (found["stages"], found["petra"]) == (3, 4.0)
  assert found["micro_batches"] == 7
  assert found["times"]["6"] == pytest.approx(4.0)
  _, out, _ = ran("small")
  assert "at M = 7: 4.000 with 6, 3.857 with 7. By the formula" in out
  assert "PETRA is faster for M < 6." in out


def test_the_table_equals_what_is_kept(ran, kept):
  _, out, _ = ran("small")
  for name, x in kept["schedules"].items():
    row = next(line for line in out.splitlines() if line.startswith(name))
    expected = [str(x["ticks"]), str(x["in_flight"])]
    assert row.removeprefix(name).split()[:2] == expected
    assert row.split()[-2:] == [f"{x['time']:.3f}", f"{x['formula']:.3f}"]


def test_the_picture_is_one(kept, folder):
  with Image.open(folder / "small" / "pipeline_schedule.png") as image:
    image.load()
    assert image.format == "PNG" and min(image.size) > 600


MESSAGES = {
  "cross": "--cross: numbers of stages, each at least 2, e.g. 4,8; got '4,1'",
  "argument": "unknown arguments: ['petra']",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_one_line(name, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in out + err
  assert "Traceback" not in out + err
  assert not (folder / name).exists()
