"""Real processes, killed and started again, against runs that were not."""

import functools
import os
import random
import signal
import subprocess

import pytest

from distrain_jax.train import EXIT_CODE


@pytest.fixture
def steps():
  """Where to stop a run, some steps on: any must do; shown on failure."""
  steps = random.SystemRandom().randrange(3, 15)
  print(f"stopped {steps} steps after it started")
  return steps


def went(run, steps):
  """Waits for that many steps of this start."""
  before = run.logged()
  run.until(lambda: run.logged() >= before + steps)


def saving(run):
  return any((run.folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def kill_while_saving(start):
  """Starts runs and kills them, until one died while it saved."""
  for _ in range(5):
    run = start()
    went(run, 2)
    run.until(functools.partial(saving, run))
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    if saving(run):
      return
  pytest.fail("no kill landed in a save")


def kill_after(steps, run):
  went(run, steps)
  run.send(signal.SIGKILL)
  assert run.wait() == -signal.SIGKILL


def finish(run):
  assert run.wait() == 0, run.text()


@pytest.mark.parametrize("method", ["ddp", "acco"])
def test_stopped_runs_end_with_the_bits_of_one_that_was_not(
  method, steps, start, uninterrupted, assert_same_end, tmp_path
):
  run = functools.partial(start, tmp_path, f"--config.method.name={method}")
  kill_after(steps, run())
  kill_while_saving(lambda: run("--config.checkpoint.every=1"))
  if method == "ddp":
    finish_after_losing_no_step(run)
  else:
    finish(run())
  assert_same_end(tmp_path, uninterrupted(method))


def finish_after_losing_no_step(start):
  run = start("--config.checkpoint.every=0")  # only because it is interrupted
  went(run, 2)
  run.send(signal.SIGINT)
  assert run.wait() == EXIT_CODE, run.text()
  last = run.logged_steps()[-1]
  assert f"stopped after step {last}, which is saved" in run.text()
  run = start()
  finish(run)
  assert f"going on from step {last}" in run.text()


def children(run):
  """Process ids, in the order in which they were started."""
  out = subprocess.check_output(
    ["ps", "-o", "pid=", "--ppid", str(run.process.pid)], text=True
  )
  return sorted(map(int, out.split()))


def kill_one_of_two_after(steps, run):
  went(run, steps)
  os.kill(children(run)[1], signal.SIGKILL)
  assert run.wait() == 128 + signal.SIGKILL
  assert run.text().count("local.py: ") == 1
  assert "process 1 of 2 was ended by SIGKILL" in run.text()


def test_two_processes_killed_end_with_the_bits_of_one_that_was_not(
  steps, start, uninterrupted, assert_same_end, tmp_path
):
  flag = "--config.method.name=zero1"
  two = functools.partial(start, tmp_path, flag, arg="pair", local=True)
  kill_one_of_two_after(steps, two())
  finish(two())
  assert_same_end(tmp_path, uninterrupted("zero1", "pair"))


def test_two_processes_stop_after_the_same_step_with_all_that_is_in_flight(
  steps, start, assert_same_end, tmp_path
):
  """A pipeline: its checkpoints hold messages that are between stages."""
  folder, reference = tmp_path / "stopped", tmp_path / "reference"
  two = functools.partial(start, local=True, arg="stages")
  run = two(reference)
  assert run.wait() == 0, run.text()
  kill_one_of_two_after(steps, two(folder))
  run = two(folder)
  went(run, 2)
  os.kill(children(run)[1], signal.SIGTERM)
  assert run.wait() == EXIT_CODE, run.text()
  finish(two(folder))
  assert_same_end(folder, reference)
