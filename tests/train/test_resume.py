"""Real processes, killed and started again, against runs that were not."""

import functools
import os
import random
import signal
import subprocess

import pytest

from distrain_jax.train import EXIT_CODE

LOCAL = ("--processes=2", "--devices=2")


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


@pytest.mark.parametrize(
  "method, interrupt", [("ddp", signal.SIGINT), ("zero1", signal.SIGTERM)]
)
def test_a_run_stopped_in_three_ways_ends_with_the_bits_of_one_that_was_not(
  method, interrupt, steps, start, uninterrupted, assert_same_end, tmp_path
):
  flag = f"--config.method.name={method}"
  run = start(tmp_path, flag)
  went(run, steps)
  run.send(signal.SIGKILL)
  assert run.wait() == -signal.SIGKILL

  every = "--config.checkpoint.every=1"
  kill_while_saving(lambda: start(tmp_path, flag, every))

  never = "--config.checkpoint.every=0"  # only because it was interrupted
  run = start(tmp_path, flag, never)
  went(run, 2)
  run.send(interrupt)
  assert run.wait() == EXIT_CODE, run.text()
  last = run.logged_steps()[-1]
  assert f"stopped after step {last}, which is saved" in run.text()
  assert (tmp_path / "checkpoints" / str(last)).is_dir()

  run = start(tmp_path, flag)
  assert run.wait() == 0, run.text()
  assert f"going on from step {last}" in run.text()
  assert_same_end(tmp_path, uninterrupted(method))


def children(run):
  """Process ids, in the order in which they were started."""
  out = subprocess.check_output(
    ["ps", "-o", "pid=", "--ppid", str(run.process.pid)], text=True
  )
  return sorted(map(int, out.split()))


@pytest.mark.parametrize("method", ["ddp", "zero1"])
def test_two_processes_stopped_by_a_signal_to_one_of_them(
  method, steps, start, assert_same_end, tmp_path
):
  reference, folder = tmp_path / "reference", tmp_path / "stopped"
  flag = f"--config.method.name={method}"
  run = start(reference, flag, local=LOCAL)
  assert run.wait() == 0, run.text()

  run = start(folder, flag, local=LOCAL)
  went(run, steps)
  os.kill(children(run)[1], signal.SIGKILL)
  assert run.wait() == 128 + signal.SIGKILL
  assert run.text().count("local.py: ") == 1
  assert "process 1 of 2 was ended by SIGKILL" in run.text()

  if method == "zero1":  # once is enough: this is the trainer's doing
    run = start(folder, flag, local=LOCAL)
    went(run, 2)
    os.kill(children(run)[1], signal.SIGTERM)
    assert run.wait() == EXIT_CODE, run.text()  # both, after the same step

  run = start(folder, flag, local=LOCAL)
  assert run.wait() == 0, run.text()
  assert_same_end(folder, reference)
