"""launch/subnetworks.py as a user meets it: a report, a picture, refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SDP = "--config.method.name=sdp"
SMALL = [
  "--config=configs/digits.py",
  "--workers=2",
  "--batches=1",
  "--config.batch_size=8",
  "--config.model.widths=(8,)",
  "--config.compilation_cache=",
]
COMMANDS = {
  "units": [*SMALL, SDP, "--steps=2", "--coverages=0.5"],
  "refused": [*SMALL, SDP, "--steps=0", "--coverages=0.3"],
  "method": SMALL,
  "coverage": [*SMALL, SDP, "--config.method.coverage=0.3"],
  "number": [*SMALL, SDP, "--coverages=half"],
  "argument": [*SMALL, SDP, "report"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("subnetworks")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "subnetworks.py")
  commands = {}
  for name, arguments in COMMANDS.items():
    given = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    commands[name] = [script, *given, f"--out={folder / name}"]
  imports = "import distrain_jax.train, distrain_jax.inspect.subnetworks\n"
  imports += "import sklearn.datasets, matplotlib.figure"
  return run_launchers(commands, folder, imports)


def test_a_report_is_printed_and_numbers_are_kept_and_drawn(ran, folder):
  code, out, err = ran("units")
  assert code == 0, err
  assert "each of 2" in out and "4 of 8" in out
  assert "50.0% of that in a subnetwork" in out
  assert "step 2/2: loss" in err
  found = json.loads((folder / "units" / "sdp_alignment.json").read_text())
  assert found["load"]["units"] == {"hidden_0": [4, 4]}
  assert 2 * found["load"]["flops"][0] == found["load"]["flops_of_whole_model"]
  assert (found["workers"], found["rows"]) == (2, 8)
  assert list(found["alignment"]) == ["start", "after 2 steps"]
  for variants in found["alignment"].values():
    assert list(variants) == ["neuron forward", "neuron backward"]
    backward = variants["neuron backward"]["0.5"]
    assert backward["cosine"] == pytest.approx([1, 1], abs=2e-6)
    forward = variants["neuron forward"]["0.5"]
    assert 0 < forward["cosine_to_mean"] < backward["cosine_to_mean"] < 1
  start, after = found["alignment"].values()
  assert start != after
  with Image.open(folder / "units" / "sdp_alignment.png") as image:
    image.load()
    assert image.format == "PNG" and min(image.size) > 600


def test_what_a_model_cannot_is_said_and_the_rest_is_measured(ran, folder):
  _, out, _ = ran("units")
  assert "Not measured: sdp: no parameter has an axis that level='block'" in out
  found = json.loads((folder / "units" / "sdp_alignment.json").read_text())
  assert set(found["refused"]) == {"block forward, 0.5", "block backward, 0.5"}


MESSAGES = {
  "refused": "No variant can be measured",
  "method": "Add --config.method.name=sdp",
  "coverage": "Nearest: 0.5",
  "number": "could not convert string to float: 'half'",
  "argument": "unknown arguments: ['report']",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_one_line(name, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in out + err
  assert "Traceback" not in out + err
  assert not (folder / name).exists()
