"""Signals are noted while a run goes, and obeyed again afterwards."""

import os
import signal
import threading

import pytest

from distrain_jax import spmd
from distrain_jax.train.interrupt import Agreement, StopSignal

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_the_handler_before_comes_back(number):
  before = [signal.getsignal(n) for n in BOTH]
  with StopSignal() as stop:
    assert not stop.seen
    os.kill(os.getpid(), number)
    assert stop.seen
  assert [signal.getsignal(n) for n in BOTH] == before


def test_a_second_interrupt_from_the_keyboard_is_obeyed_at_once():
  with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one of these is not
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    assert stop.seen


def test_handlers_that_python_did_not_set_become_the_default(monkeypatch):
  """As the one that jax.distributed sets: signal.signal gives None for it."""
  calls = []
  monkeypatch.setattr(signal, "signal", lambda *x: calls.append(x))
  with StopSignal():
    calls.clear()
  assert calls == [(number, signal.SIG_DFL) for number in BOTH]


def test_outside_the_main_thread_signals_are_left_alone():
  before, seen = signal.getsignal(signal.SIGTERM), []

  def run():
    with StopSignal() as stop:
      seen.append((stop.seen, signal.getsignal(signal.SIGTERM) == before))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(False, True)]


def test_one_process_agrees_with_itself_at_once(mesh):
  for where in (None, mesh(4)):
    agreed = Agreement(where)
    assert [agreed(False), agreed(True), agreed(False)] == [False, True, False]


def test_several_agree_on_the_answer_of_the_step_before(mesh, monkeypatch):
  monkeypatch.setattr(spmd, "spans_processes", lambda mesh: True)
  agreed = Agreement(mesh(4))
  assert [agreed(False), agreed(True), agreed(False)] == [False, False, True]
