"""launch/train.py as a user meets it: good runs, and one line for each mistake.

Importing takes longer than most of these commands, so they are forked from one
process that has imported everything and started nothing.
"""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = "--config=configs/digits.py:quick"
COMMANDS = {
  "good": [QUICK, "--devices=4", "--config.method.name=zero1"],
  "again": [QUICK, "--devices=4", "--config.method.name=zero1"],
  "field": [QUICK, "--config.batch_sise=3"],
  "type": [QUICK, "--config.steps=many"],
  "option's type": [QUICK, "--config.method.accumulate=many"],
  "no config": [],
  "argument": [QUICK, "quick"],
  "mesh": [QUICK, "--devices=4", "--config.mesh.data=3"],
  "batch": [QUICK, "--devices=8", "--config.batch_size=100"],
  "accumulate": [QUICK, "--devices=8", "--config.method.accumulate=3"],
  "evaluation": [QUICK, "--devices=8", "--config.evaluation.batch_size=100"],
  "method": [QUICK, "--config.method.name=zero2"],
  "option": [QUICK, "--config.method.wire_dtype=bfloat16"],
  "dtype": [
    QUICK,
    "--config.method.name=zero1",
    "--config.method.param_dtype=bf16",
  ],
  "data": [QUICK, "--config.data.name=digit"],
  "no data": [
    "--config=configs/text.py",
    "--config.data.name=tokens",
    "--config.data.folder=none",
  ],
  "model": [QUICK, "--config.model.name=mpl"],
  "package": [QUICK, "--devices=1", "--config.log.wandb=project"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output) of that command."""
  commands = {}
  for name, arguments in COMMANDS.items():
    workdir = folder / ("run" if name in ("good", "again") else f"{name} run")
    commands[name] = [
      str(ROOT / "launch" / "train.py"),
      *(a.replace("configs/", f"{ROOT}/configs/") for a in arguments),
      f"--workdir={workdir}",
    ]
  run = run_launchers(
    commands,
    folder,
    "import distrain_jax.train, sklearn.datasets, matplotlib.figure",
  )

  def output(name):
    code, out, err = run(name)
    return code, err + out

  return output


def test_a_run_prints_its_result_and_leaves_its_folder(ran, folder):
  code, output = ran("good")
  assert code == 0
  lines = output.splitlines()
  assert lines[-3].startswith("test_loss ")
  assert lines[-2].startswith("test_accuracy ")
  assert lines[-1] == f"curves: {folder / 'run' / 'curves.png'}"
  run = folder / "run"
  assert {x.name for x in run.iterdir()} == {
    "checkpoints",
    "config.json",
    "curves.png",
    "metrics.jsonl",
  }
  config = json.loads((run / "config.json").read_text())
  assert config["method"]["name"] == "zero1"
  assert config["steps"] == 20


def test_the_same_command_again_prints_the_same_result(ran):
  results = [ran(name)[1].splitlines()[-3:] for name in ("good", "again")]
  assert results[0] == results[1]
  assert "going on from step 20" in ran("again")[1]


MESSAGES = {
  "field": "batch_sise Did you mean batch_size",
  "type": "flag --config.steps=many: invalid literal for int()",
  "option's type": "flag --config.method.accumulate=many: invalid literal",
  "no config": "--config",
  "argument": "unknown arguments: ['quick']",
  "mesh": "mesh of {'data': 3} needs 3 devices, but there are 4 (cpu)",
  "batch": "Nearest: 96 or 104, e.g. --config.batch_size=104.",
  "accumulate": "config.method.accumulate=3. Nearest: 120 or 144",
  "evaluation": "--config.evaluation.batch_size=104",
  "method": (
    "Did you mean 'zero1'? It is one of acco, dart, ddp, diloco, dpu, "
    "ensemble, fsdp, local_sgd, papa, petra, pipeline, sdp, sparta, wash, "
    "weight_prediction, zero1."
  ),
  "option": "config.method.wire_dtype='bfloat16', but ddp has no such option",
  "dtype": "config.method.param_dtype='bf16'. Did you mean 'bfloat16'?",
  "data": "Did you mean 'digits'",
  "no data": "python launch/prepare_data.py --out=none",
  "model": "Did you mean 'mlp'",
  "package": "pip install 'distrain-jax[wandb]'",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_told_without_a_traceback(name, ran, folder):
  if name == "package" and importlib.util.find_spec("wandb"):
    pytest.skip("wandb is installed")
  code, output = ran(name)
  assert code != 0
  assert MESSAGES[name] in output
  assert "Traceback" not in output
  assert not (folder / f"{name} run" / "metrics.jsonl").exists()
