"""launch/local.py with commands that need no JAX; runs are in train/."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
PATIENCE = 60.0  # seconds, of a loaded machine

WAIT = "import time; time.sleep(600)"
# Says who it is once it is ready, and when it is asked to stop.
POLITE = """
import os, signal, sys
def stop(number, frame):
  print("asked by", signal.Signals(number).name, flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("pid", os.getpid(), flush=True)
while True:
  signal.pause()
"""


@pytest.fixture
def start(tmp_path):
  """start(code, *flags) -> local.py running `python -c code`, by default 2."""
  started = []

  def run(code, *flags):
    command = [sys.executable, LOCAL, f"--logs={tmp_path}", *flags]
    process = subprocess.Popen(
      [*command, "--", sys.executable, "-c", code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield run
  for process in started:
    if process.poll() is None:
      process.terminate()
    process.communicate(timeout=PATIENCE)


def run(start, code, *flags):
  process = start(code, *flags)
  out, error = process.communicate(timeout=PATIENCE)
  return process.returncode, out, error


def log(folder, i):
  return (folder / f"process_{i}.log").read_text()


def until(condition):
  limit = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < limit
    time.sleep(0.01)


def pids(folder, processes=2):
  """Of the processes, once all of them are ready."""

  def lines(i):
    path = folder / f"process_{i}.log"
    return path.read_text().splitlines() if path.exists() else []

  until(lambda: all("pid" in "".join(lines(i)) for i in range(processes)))
  return [int(lines(i)[0].split()[1]) for i in range(processes)]


def alive(pid):
  """Whether it runs; one that is dead and not yet waited for does not."""
  command = ["ps", "-o", "stat=", "-p", str(pid)]
  stat = subprocess.run(command, capture_output=True, text=True).stdout.strip()
  return bool(stat) and not stat.startswith("Z")


def test_each_process_is_told_who_it_is_and_where_the_first_one_is(
  start, tmp_path
):
  code = """import os
print(*(os.environ["JAX_" + x] for x in
  ("PROCESS_ID", "NUM_PROCESSES", "COORDINATOR_ADDRESS")))"""
  assert run(start, code, "--processes=3")[0] == 0
  told = [log(tmp_path, i).split() for i in range(3)]
  assert [x[:2] for x in told] == [["0", "3"], ["1", "3"], ["2", "3"]]
  (address,) = {x[2] for x in told}
  host, port = address.split(":")
  assert host == "localhost"
  assert int(port) > 0


def test_only_the_first_process_is_shown_and_each_has_a_log(start, tmp_path):
  code = """import os, sys
print("out", os.environ["JAX_PROCESS_ID"])
print("error", os.environ["JAX_PROCESS_ID"], file=sys.stderr)"""
  code, out, error = run(start, code)
  assert (code, error) == (0, "")
  assert out.splitlines() == ["out 0", "error 0"]
  assert log(tmp_path, 1).splitlines() == ["out 1", "error 1"]


def test_a_second_start_adds_to_the_logs_and_shows_its_own_part(
  start, tmp_path
):
  assert run(start, "print('first')")[1] == "first\n"
  assert run(start, "print('second')")[1] == "second\n"
  assert log(tmp_path, 1) == "first\nsecond\n"


def test_devices_become_a_flag_of_the_command(start):
  code = "import sys; print(sys.argv[1:])"
  assert run(start, code, "--devices=4")[1] == "['--devices=4']\n"
  assert run(start, code)[1] == "[]\n"


@pytest.mark.parametrize("flag", [["--workdir=run"], ["--workdir", "run"]])
def test_logs_lie_in_the_commands_workdir(flag, tmp_path):
  command = [sys.executable, LOCAL, "--processes=1", "--", sys.executable]
  subprocess.run([*command, "-c", "", *flag], cwd=tmp_path, check=True)
  assert (tmp_path / "run" / "logs" / "process_0.log").exists()


def test_one_that_fails_ends_all_with_one_error(start, tmp_path):
  code = f"""import os, pathlib, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
  others = [pathlib.Path({str(tmp_path)!r}, f"process_{{i}}.log") for i in (0, 2)]
  while not all(x.exists() and "pid" in x.read_text() for x in others):
    time.sleep(0.01)
  print("\\n".join(f"line {{i}}" for i in range(100)))
  sys.exit("what went wrong")
print("pid", os.getpid(), flush=True)
{WAIT}"""
  code, _, error = run(start, code, "--processes=3")
  assert code == 1
  first, *rest = error.splitlines()
  assert first == (
    "local.py: process 1 of 3 ended with exit code 1, so all were ended. "
    f"The end of {tmp_path / 'process_1.log'}:"
  )
  assert rest[-2:] == ["  line 99", "  what went wrong"]
  assert len(rest) == 15
  assert not any(alive(int(log(tmp_path, i).split()[1])) for i in (0, 2))


def test_one_that_is_killed_ends_all_with_one_error(start, tmp_path):
  process = start(POLITE)
  first, second = pids(tmp_path)
  os.kill(second, signal.SIGKILL)
  _, error = process.communicate(timeout=PATIENCE)
  assert process.returncode == 128 + signal.SIGKILL
  assert error.startswith("local.py: process 1 of 2 was ended by SIGKILL")
  assert not alive(first)


@pytest.mark.parametrize(
  "sent, received",
  [
    (signal.SIGTERM, "SIGTERM"),
    (signal.SIGINT, "SIGINT"),
    (signal.SIGHUP, "SIGTERM"),  # a closed terminal asks to save
  ],
)
def test_a_signal_reaches_all_and_their_exit_code_comes_back(
  sent, received, start, tmp_path
):
  process = start(POLITE)
  pids(tmp_path)
  process.send_signal(sent)
  _, error = process.communicate(timeout=PATIENCE)
  assert (process.returncode, error) == (75, "")
  for i in range(2):
    assert f"asked by {received}" in log(tmp_path, i)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_no_process_outlives_a_local_py_that_was_killed(start, tmp_path):
  process = start(POLITE)
  both = pids(tmp_path)
  process.kill()
  until(lambda: not any(map(alive, both)))


def test_what_a_process_started_ends_with_it(start, tmp_path):
  code = f"""import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{WAIT}"])
print("pid", child.pid, flush=True)
sys.exit(1 if os.environ["JAX_PROCESS_ID"] == "0" else 0)"""
  assert run(start, code)[0] == 1
  for i in range(2):
    if log(tmp_path, i):
      child = int(log(tmp_path, i).split()[1])
      until(lambda child=child: not alive(child))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--processes=0", "--", "true"], "--processes is at least 1; got 0"),
    (["--devices=-1", "--", "true"], "--devices is at least 1; got -1"),
    (["--", "launch/trian.py"], "launch/trian.py is no file"),
    ([], "required: command"),
  ],
)
def test_bad_arguments_start_nothing(arguments, message, tmp_path):
  result = subprocess.run(
    [sys.executable, LOCAL, *arguments],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert message in result.stderr
  assert not list(tmp_path.iterdir())
