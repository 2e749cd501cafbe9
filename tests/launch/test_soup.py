"""launch/soup.py in a process of its own: on runs, on files, on bad input."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT}/configs/digits.py:quick"
TRAIN = [str(ROOT / "launch" / "train.py"), CONFIG, "--config.steps=2"]
QUICK = ["--eval_batches=1", "--batches=1", "--points=3"]
SOUP = [str(ROOT / "launch" / "soup.py"), "--cpu", *QUICK]
COMMANDS = {
  "train": [
    *TRAIN,
    "--workdir=runs/many",
    "--devices=2",
    "--config.method.name=local_sgd",
  ],
  "soup": [
    *SOUP,
    "runs/many",
    "--out=out",
    "--layer_points=0",
    "--save=new/greedy.safetensors",
  ],
  "with a file": [
    *SOUP,
    "runs/many",
    "new/greedy.safetensors",
    CONFIG,
    "--out=out2",
    "--pairs=first",
    "--layer_points=2",
    "--save=uniform.safetensors",
    "--soup=uniform",
  ],
  "no config": [*SOUP, "new/greedy.safetensors", "runs/many"],
  "only one": [*SOUP, "new/greedy.safetensors", CONFIG],
  "no member": [*SOUP, "new/greedy.safetensors", CONFIG, "--leave=x"],
  "no run": [*SOUP, "runs/two", "runs/many"],
  "twice": [*SOUP, "runs/many", "runs/many"],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, run_launchers):
  folder = tmp_path_factory.mktemp("soup")
  imports = "import distrain_jax.train, sklearn.datasets, matplotlib.figure"
  return folder, run_launchers(COMMANDS, folder, imports)


def test_runs_and_files_become_soups(ran):
  folder, run = ran
  for name in ("train", "soup", "with a file"):
    code, _, err = run(name)
    assert code == 0, err
  _, out, _ = run("soup")
  for name in (
    "runs/many[0] ",
    "runs/many[1] ",
    "ensemble of probabilities ",
    "soup: uniform ",
    "soup: repair ",
    "soup: greedy ",
    "greedy soup of ",
    "consensus distance: ",
    "barrier many[0] to many[1]: ",
    "wrote new/greedy.safetensors: the soup greedy",
  ):
    assert any(line.startswith(name) for line in out.splitlines()), name
  assert (folder / "out" / "soup.png").stat().st_size > 5000
  found = json.loads((folder / "out" / "soup.json").read_text())
  assert set(found["paths"]) == {"many[0] to many[1]"}
  accuracy = lambda name: found["scores"][name]["validation"]["accuracy"]
  members = [x for x in found["scores"] if x.startswith("runs/")]
  assert accuracy("soup: greedy") >= max(map(accuracy, members))
  found = json.loads((folder / "out2" / "soup.json").read_text())
  first = "many[0] to greedy.safetensors"
  assert set(found["paths"]) == {"many[0] to many[1]", first}
  assert set(found["layer_paths"]) == {"dense_0", "dense_1", "output"}
  assert (folder / "uniform.safetensors").exists()


@pytest.mark.parametrize(
  "name, says",
  [
    ("no config", "does not say what data it is of. Add --config=FILE"),
    ("only one", "two or more models; 1 found in ['new/greedy.safet"),
    ("no run", "runs/two/config.json: no such file"),
    ("no member", "--leave=x: no such member of ['new/greedy.safet"),
    ("twice", "one is given twice"),
  ],
)
def test_bad_input_is_one_line(name, says, ran):
  _, run = ran
  code, out, err = run(name)
  assert code == 1 and says in err and "Traceback" not in err and not out
