"""launch/export.py in a process of its own: a run, its model, another run."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = [
  str(ROOT / "launch" / "train.py"),
  f"--config={ROOT}/configs/digits.py:quick",
  "--config.steps=1",
  "--config.method.name=sdp",
]
EXPORT = str(ROOT / "launch" / "export.py")
COMMANDS = {
  "first": [*TRAIN, "--workdir=first", "--devices=4"],
  "export": [EXPORT, "first", "new/first.safetensors"],
  "fewer devices": [EXPORT, "first", "two.safetensors", "--devices=2"],
  "other split": [
    *TRAIN,
    "--workdir=other",
    "--devices=2",
    "--config.method.coverage=1.0",
    "--config.initial_params=new/first.safetensors",
  ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, run_launchers):
  folder = tmp_path_factory.mktemp("export")
  imports = "import distrain_jax.train, sklearn.datasets, matplotlib.figure"
  return folder, run_launchers(COMMANDS, folder, imports)


def test_a_run_goes_on_split_otherwise_on_fewer_workers(ran):
  _, run = ran
  for name in COMMANDS:
    code, _, err = run(name)
    assert code == 0, err
  assert run("export")[1] == "new/first.safetensors: mlp of step 1\n"
  assert "test_loss" in run("other split")[1]


def test_the_number_of_devices_does_not_matter_to_the_file(ran):
  folder, _ = ran
  files = ("new/first.safetensors", "two.safetensors")
  four, two = ((folder / file).read_bytes() for file in files)
  assert four == two
