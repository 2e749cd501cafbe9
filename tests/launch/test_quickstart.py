"""The quickstart's table and picture, and the scripts around it."""

import os
import subprocess
import sys
from pathlib import Path

from distrain_jax import methods

ROOT = Path(__file__).resolve().parent.parent.parent


def test_quickstart_has_a_row_for_every_method_and_a_picture(tmp_path):
  command = [sys.executable, "launch/quickstart.py", f"--workdir={tmp_path}"]
  done = subprocess.run(
    [*command, "--steps=3"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  rows = {line.split()[0]: line.split()[1:] for line in lines if line}
  for method in (*methods.FACTORIES, "mulo"):
    accuracy, loss, sent, held = rows[method]
    assert 0 < float(accuracy) < 1 and float(loss) > 0
    assert int(sent.replace(",", "")) > 0 and int(held.replace(",", "")) > 0
  sent = {m: int(rows[m][2].replace(",", "")) for m in methods.FACTORIES}
  assert min(sent, key=sent.get) == "ensemble"
  assert sent["wash"] < sent["sparta"]
  assert "members' average" in done.stdout
  picture = Path(lines[-1].removeprefix("curves: "))
  assert picture.read_bytes().startswith(b"\x89PNG")


def environment(tmp_path, version, calls, project=""):
  """Runs use_environment with a fake Python of that version."""
  fake = tmp_path / "python"
  fake.write_text(f"""#!/bin/sh
    case "$*" in
      *print*) echo {version} ;;
      *exit*) exit {int(version == "3.10")} ;;
      *venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
      *pip*) echo "$@" >>{calls} ;;
    esac
  """)
  fake.chmod(0o755)
  (tmp_path / "launch").mkdir(exist_ok=True)
  (tmp_path / "constraints").mkdir(exist_ok=True)
  for path in ("constraints/oldest.txt", "constraints/newest.txt"):
    (tmp_path / path).write_text("")
  (tmp_path / "pyproject.toml").write_text(project)
  script = (ROOT / "launch/environment.sh").read_text()
  (tmp_path / "launch/environment.sh").write_text(script)
  return subprocess.run(
    ["bash", "-c", "set -eu; . launch/environment.sh; use_environment test"],
    cwd=tmp_path,
    env=os.environ | {"PYTHON": str(fake)},
    capture_output=True,
    text=True,
  )


def test_the_second_run_installs_nothing(tmp_path):
  calls = tmp_path / "calls"
  for _ in range(2):
    done = environment(tmp_path, "3.13", calls)
    assert done.returncode == 0, done.stderr
  installed = calls.read_text().splitlines()
  assert len(installed) == 1
  assert "constraints/newest.txt" in installed[0] and ".[test]" in installed[0]
  assert environment(tmp_path, "3.13", calls, "changed").returncode == 0
  assert len(calls.read_text().splitlines()) == 2


def test_each_python_has_its_end_of_the_constraints(tmp_path):
  calls = tmp_path / "calls"
  environment(tmp_path, "3.11", calls)
  assert "constraints/oldest.txt" in calls.read_text()
  assert (tmp_path / ".venv-py3.11").exists()


def test_a_python_that_is_too_old_is_refused_by_name(tmp_path):
  done = environment(tmp_path, "3.10", tmp_path / "calls")
  assert done.returncode != 0
  assert "Python 3.11 or newer is needed" in done.stderr
  assert not (tmp_path / "calls").exists()
