"""A bar on a terminal, lines elsewhere."""

import sys

import pytest

from distrain_jax.train import progress
from distrain_jax.train.progress import Progress


@pytest.fixture
def clock(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_lines_come_at_the_first_step_then_every_so_often_and_at_the_last(
  clock, capsys
):
  with Progress(0, 40, "mine") as shown:
    for step in range(1, 41):
      clock[0] += 1.0
      shown.update(step, {"loss": 1 / step, "grad_norm": 2.0, "other": 3.0})
  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[2] for line in lines] == [
    f"{step}/40" for step in (1, 11, 21, 31, 40)
  ]
  assert lines[1] == "mine: step 11/40  loss 0.09091  grad_norm 2  1 steps/s"


def test_the_pace_is_of_this_process(clock, capsys):
  with Progress(30, 40, "mine") as shown:
    for step in range(31, 41):
      clock[0] += 0.5
      shown.update(step, {})
  assert "2 steps/s" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_has_a_bar_from_where_the_run_goes_on(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  with Progress(3, 8, "mine") as shown:
    for step in range(4, 9):
      shown.update(step, {"loss": 0.25})
    shown.say("a line that stays")
  text = capsys.readouterr().err
  assert "mine:  38%" in text  # 3 of 8
  assert "8/8" in text
  assert "loss=0.25" in text
  assert "mine: a line that stays\n" in text
  assert "step 8/8" not in text


def test_other_processes_are_silent(capsys):
  with Progress(0, 2, "mine", show=False) as shown:
    shown.update(1, {"loss": 1.0})
    shown.say("nothing")
  assert capsys.readouterr() == ("", "")
