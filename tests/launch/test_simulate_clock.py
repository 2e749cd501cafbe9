"""launch/simulate_clock.py as a user meets it: tables, pictures, refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from distrain_jax.inspect import clock

ROOT = Path(__file__).parents[2]
SMALL = ["--updates=4", "--sync_every=6", "--delay=2"]
COMPILED = {
  "config_file": "configs/digits.py",
  "reports": [
    {"name": "fsdp", "hardware": "v5e:2x1"},
    {
      "name": "zero1",
      "hardware": "v5e:2x1",
      "devices": 2,
      "model": {"step_seconds": 3.0, "compute_seconds": 2.0},
      "collectives": [
        {"kind": k, "seconds": 0.25, "runs": 2, "each_keeps_a_part": False}
        for k in ("reduce-scatter", "all-gather")
      ],
    },
  ],
}
COMMANDS = {
  "default": ["--tokens=1000"],
  "given": [
    *SMALL,
    "--workers=3",
    "--micro_batch=0.1,0.2,0.1",
    "--slow=",
    "--update=0.01",
    "--jitter=0.1",
  ],
  "report": [*SMALL, "--report=compiled.json", "--slow=1:2"],
  "number": ["--all_gather=fast"],
  "many": ["--micro_batch=1,2,3"],
  "slow": ["--slow=3"],
  "nobody": ["--slow=4:2"],
  "odd": ["--accumulate=3"],
  "no file": ["--report=nowhere.json"],
  "no report": ["--report=list.json"],
  "argument": ["zero1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("clock")
  (made / "compiled.json").write_text(json.dumps(COMPILED))
  (made / "list.json").write_text("[]")
  return made


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "simulate_clock.py")
  commands = {
    name: [script, *arguments, f"--out={folder / name}"]
    for name, arguments in COMMANDS.items()
  }
  imports = "import distrain_jax.inspect, matplotlib.figure"
  return run_launchers(commands, folder, imports)


def kept(folder, name):
  return json.loads((folder / name / "clock.json").read_text())


def test_the_default_shows_the_gain_the_loss_and_the_slow_worker(ran, folder):
  code, out, err = ran("default")
  assert code == 0, err
  assert "at most 1.50 times as fast, where it is 0.5; no faster from 1" in out
  assert "makes 3.25 times ddp's gradients a second" in out
  assert "twice the bytes of zero1" in out
  found = kept(folder, "default")
  assert [list(c["methods"]) for c in found["cases"]] == [
    list(clock.METHODS)
  ] * 2
  sweep = {m: x["update_seconds"] for m, x in found["sweep"].items()}
  for ratio, zero1, acco in zip(found["ratios"], sweep["zero1"], sweep["acco"]):
    assert zero1 == pytest.approx(0.4 * (1 + ratio), rel=1e-5)
    assert acco == pytest.approx(0.4 * max(1, 2 * ratio), rel=1e-5)
  for name in ("clock_ratio.png", "clock_gantt.png"):
    with Image.open(folder / "default" / name) as image:
      image.load()
      assert image.format == "PNG" and min(image.size) > 600


def test_the_table_has_a_row_a_method_that_equals_what_is_kept(ran, folder):
  _, out, _ = ran("default")
  first = kept(folder, "default")["cases"][0]["methods"]
  for method, o in first.items():
    row = next(
      x for x in out.splitlines() if x.startswith(f"{method} ")
    ).split()
    rate = o["micro_batches_per_second"]
    assert row[1] == f"{o['update_seconds']:.4g}"
    assert row[3:5] == [f"{rate:.4g}", f"{1000 * rate:,.0f}"]


def test_times_can_differ_by_worker_and_jitter(ran, folder):
  code, _, err = ran("given")
  assert code == 0, err
  found = kept(folder, "given")
  (case,) = found["cases"]  # nobody was slowed
  assert case["times"]["micro_batch"] == [0.1, 0.2, 0.1]
  assert case["times"]["update"] == 0.01
  assert case["methods"]["zero1"]["update_seconds"] > 4 * 0.2
  assert (folder / "given" / "clock_gantt.png").exists()


def test_a_compiled_report_gives_the_times(ran, folder):
  code, out, err = ran("report")
  assert code == 0, err
  assert out.startswith(
    "zero1 of configs/digits.py on v5e:2x1: 4 micro-batches"
  )
  plain, slow = kept(folder, "report")["cases"]
  assert plain["times"]["micro_batch"] == [0.5, 0.5]
  assert slow["times"]["micro_batch"] == [0.5, 1.0]
  assert plain["methods"]["zero1"]["update_seconds"] == pytest.approx(3.0)
  assert plain["methods"]["acco"]["update_seconds"] == pytest.approx(2.0)


MESSAGES = {
  "number": "--all_gather: one number for all workers or one for each",
  "many": "`micro_batch` has 3 numbers for 4 workers",
  "slow": "--slow: WORKER:FACTOR, e.g. 0:4,2:1.5; got '3'",
  "nobody": "worker 4, but the 4 workers are 0 to 3",
  "odd": "`accumulate` is even; got 3, e.g. 4",
  "no file": "nowhere.json",
  "no report": "list.json is no report.json of launch/compile.py",
  "argument": "unknown arguments: ['zero1']",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_one_line(name, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in out + err
  assert "Traceback" not in out + err
  assert not (folder / name).exists()
