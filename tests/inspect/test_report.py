"""The report as text and as JSON, from a step made by hand."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

import distrain_jax as dj
from distrain_jax.inspect import report as reports
from distrain_jax.inspect.collectives import Collective
from distrain_jax.inspect.hardware import CHIPS
from distrain_jax.inspect.memory import Memory, state_fields
from distrain_jax.inspect.schedule import Communication, Event, Step, Window

GROUPS = (tuple(range(8)),)
SENT = Communication(
  Collective("a", "all-reduce", "f32", 800, GROUPS, 8, 1400.0, "f/psum", True),
  runs=3,
  seconds=2e-3,
  exposed=2e-3,
  window=None,
)
HIDDEN = Communication(
  Collective("b", "all-gather", "bf16", 1600, GROUPS, 8, 1400.0, ""),
  runs=1,
  seconds=4e-3,
  exposed=1e-3,
  window=Window(3e-3, 5e9, ("fusion.1",)),
)
STEP = Step(
  seconds=17e-3,
  compute_seconds=10e-3,
  flops={"bf16": 1.97e12 / 2},
  communication=(SENT, HIDDEN),
  copies_exposed=0.0,
  events=(Event("compute", "matrix products", 0.0, 10e-3),),
  unknown=("the bytes of send",),
)
MEMORY = Memory(
  arguments=3000,
  outputs=2100,
  aliased=2000,
  temporaries=900,
  code=50,
  peak=4000,
  state={"params": 1000, "opt_state": 1800},
  batch=150,
  padding=50,
  gradient_like=600,
  activations=300,
)
REPORT = reports.Report("zero1", "v5e:2x4", 8, CHIPS["v5e"], MEMORY, STEP, 1.5)


def test_totals_count_every_run():
  assert REPORT.wire_bytes == 4 * 1400
  assert REPORT.wire_by_kind() == {"all-reduce": 4200, "all-gather": 1400}
  assert REPORT.communication_seconds == pytest.approx(10e-3)
  assert REPORT.exposed_seconds == pytest.approx(7e-3)
  assert REPORT.utilisation == pytest.approx(0.005 / 0.017)


def test_json_holds_what_the_table_shows():
  kept = json.loads(json.dumps(REPORT.to_json()))
  assert kept["memory"]["state"] == {"params": 1000, "opt_state": 1800}
  assert kept["wire_bytes"] == 5600
  assert kept["model"]["exposed_communication_seconds"] == pytest.approx(7e-3)
  first, second = kept["collectives"]
  assert (first["asynchronous"], second["asynchronous"]) == (False, True)
  assert second["window"]["instructions"] == ["fusion.1"]
  assert kept["chip"]["source"]["memory_bandwidth"].startswith("https://")
  assert kept["unknown"] == ["the bytes of send"]


def test_the_text_names_the_model_s_inputs_and_what_is_not_counted():
  text = str(REPORT)
  for part in (
    "zero1 on v5e:2x4, 8 devices",
    "state: opt_state",
    "all-reduce *",
    "would send half",
    "Not counted: the bytes of send",
    "197 TFLOP/s",
    "Model, not measurement",
    "7.000 ms",
  ):
    assert part in text


def test_without_known_peaks_there_are_no_times():
  text = str(REPORT._replace(chip=None))
  assert "no times" in text
  assert " ms" not in text


def test_a_guarded_state_is_told_by_the_method_s_fields():
  loss_fn = lambda p, b, k: (jnp.mean((b @ p) ** 2), {})
  method = dj.guard(dj.zero1(loss_fn, optax.adam(1e-3)))
  run = dj.simulate(method, workers=4)
  key = jax.random.key(0)
  state = run.abstract(key, jnp.ones((8, 2)))
  # All workers lie on one device here: 2 moments of 16, 4 counts.
  assert state_fields(state) == {
    "step": 4,
    "params": 64,
    "opt_state": 2 * 64 + 4 * 4,
    "guard": 12,
  }
