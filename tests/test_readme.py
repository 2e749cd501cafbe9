"""What the README shows runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHELL = [
  command.strip()
  for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
  for command in block.replace("\\\n", " ").splitlines()
]


def test_the_readme_has_the_examples_that_are_tested_here():
  assert len(PYTHON) == 8
  assert [c for c in SHELL if "configs/digits.py" in c and "local" not in c]


@pytest.mark.parametrize(
  "code",
  PYTHON,
  ids=[
    "notebook",
    "library",
    "acco",
    "sdp",
    "petra",
    "wash",
    "mulo",
    "inspect",
  ],
)
def test_python_examples_run(code):
  names = {}
  with jax.numpy_rank_promotion("allow"):  # as where a reader pastes it
    exec(compile(code, "README.md", "exec"), names)
  if "report" in names:  # it has asserted for itself
    assert names["report"].hardware in code
  else:
    chance = 5.6 if "dj.sdp" in code else 2.0  # of 256 tokens, at the start
    assert float(names["metrics"]["loss"]) < chance


def test_config_examples_run(tmp_path):
  commands = [
    c
    for c in SHELL
    if c.startswith("python launch/train.py --config=configs/digits.py")
  ]
  assert len(commands) == 3
  for command in commands:
    words = shlex.split(command)[1:]
    words = [
      f"--workdir={tmp_path}/{w[10:]}" if w.startswith("--workdir=") else w
      for w in words
    ]
    words += ["--config.steps=3", "--config.checkpoint.every=0"]
    done = subprocess.run(
      [sys.executable, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout


def test_every_path_that_the_readme_names_is_there():
  named = re.findall(r"(?:launch|configs|tests|results)/[\w/]+\.\w+", TEXT)
  missing = {path for path in named if not (ROOT / path).exists()}
  assert not missing
