"""Traces of the methods' own steps against plain arithmetic, and their times."""

import jax
import numpy as np
import optax
import petra_networks as nets
import pytest

import distrain_jax as dj
from distrain_jax import spmd
from distrain_jax.inspect import ticks

J, M, KEY = 3, 4, jax.random.key(0)
KEPT, AGAIN = ticks.Costs(again=0), ticks.Costs()
METHODS = {
  "petra": (dj.petra, {}),
  "1f1b": (dj.pipeline, {"buffer": "graph"}),
  "gpipe": (dj.pipeline, {"schedule": "gpipe"}),
}


def a_run(name, stages=J, micro_batches=M, mesh=None, replicas=None):
  """(run, its state, a batch)."""
  blocks, params, _ = nets.make("r" * (stages - 2))
  x, y = nets.batches(micro_batches)
  factory, options = METHODS[name]
  method = factory(
    blocks,
    optax.sgd(0.1),
    shapes=params,
    example=(x[: nets.ROWS], y[: nets.ROWS]),
    accumulate=micro_batches,
    replicas=replicas,
    **options,
  )
  if mesh is None:
    run = dj.simulate(method, workers=stages)
  else:
    run = dj.distribute(method, mesh)
  return run, run.init(KEY, params), run.put((x, y))


def traced(*args, **options):
  return ticks.trace(*a_run(*args, **options), KEY)


def expected(count, stages, micro_batches, forward, backward):
  """Tables of -1, with each micro-batch at (its tick, stage)."""
  found = []
  for tick_of in (forward, backward):
    rows = [[-1] * stages for _ in range(count)]
    for b in range(micro_batches):
      for s in range(stages):
        if tick_of(b, s) < count:
          rows[tick_of(b, s)][s] = b
    found.append(rows)
  return found


def meets(trace, rows):
  np.testing.assert_array_equal(trace.forward, rows[0])
  np.testing.assert_array_equal(trace.backward, rows[1])


UP = lambda b, s: b + s
DOWN = lambda b, s: b + 2 * (J - 1) - s


def test_petra_takes_every_micro_batch_at_its_tick():
  meets(traced("petra", micro_batches=7), expected(7, J, 7, UP, DOWN))


def test_1f1b_has_petras_ticks_until_it_is_empty():
  meets(traced("1f1b"), expected(M + 2 * (J - 1), J, M, UP, DOWN))


def test_gpipe_goes_back_when_all_are_forward():
  phase = M + J - 1
  down = lambda b, s: phase + b + J - 1 - s
  meets(traced("gpipe"), expected(2 * phase, J, M, UP, down))


def test_a_trace_on_a_mesh_equals_a_simulated_one():
  mesh = spmd.make_mesh({"stage": J}, jax.devices()[:J])
  meets(traced("petra", mesh=mesh), traced("petra"))


BUSY = {"1f1b": M / (M + 2 * (J - 1)), "gpipe": M / (M + J - 1)}


@pytest.mark.parametrize("name", BUSY)
def test_busy_is_the_fraction_of_passes_with_a_micro_batch(name):
  run, state, batch = a_run(name)
  found = ticks.trace(run, state, batch, KEY)
  _, metrics = run.step(state, batch, KEY)
  assert float(metrics["busy"]) == pytest.approx(BUSY[name], rel=1e-6)
  assert found.busy == pytest.approx(BUSY[name])


def test_petra_is_all_busy_once_it_is_full():
  run, state, batch = a_run("petra", micro_batches=2)
  seen = []
  for step in range(4):  # two ticks each; the pipeline is full from the 5th on
    found = ticks.trace(run, state, batch, KEY)
    state, metrics = run.step(state, batch, KEY)
    seen.append((float(metrics["busy"]), found))
    assert found.forward[:, 0].tolist() == [2 * step, 2 * step + 1]
  # Passes in ticks 0 to 3: 1; 2; 3 and the last one's back; 3 and 2 back.
  assert [busy for busy, _ in seen] == pytest.approx([3 / 12, 9 / 12, 1, 1])
  assert [busy for busy, _ in seen[2:]] == [1.0, 1.0]
  assert [found.busy for _, found in seen[2:]] == [1.0, 1.0]
  assert ticks.tick_times(seen[3][1], AGAIN).tolist() == [4, 4]


def test_a_guarded_method_is_traced_too():
  run, _, batch = a_run("petra")
  guarded = dj.simulate(dj.guard(run.method), workers=J)
  _, params, _ = nets.make("r")
  state = guarded.init(KEY, params)
  meets(ticks.trace(guarded, state, batch, KEY), traced("petra"))


@pytest.mark.parametrize("stages, micro_batches", [(3, 4), (3, 1), (4, 9)])
def test_1f1bs_short_ticks_make_up_for_being_many(stages, micro_batches):
  found = traced("1f1b", stages, micro_batches)
  bubble = (stages - 1) / micro_batches
  time = ticks.time_per_micro_batch(found, KEPT)
  assert time == pytest.approx(3 * (1 + bubble))
  assert ticks.busy_time(found, KEPT) == pytest.approx(1 / (1 + bubble))
  # Computed again everywhere but on the last stage, which is alone in two
  # ticks: the first and the last of its own.
  saved = min(2, micro_batches) / micro_batches
  time = ticks.time_per_micro_batch(found, AGAIN)
  assert time == pytest.approx(4 * (1 + bubble) - saved)


def test_petra_takes_4_and_kept_graphs_overtake_it_where_the_formula_says():
  full = ticks.when_full(traced("petra", micro_batches=2 * J))
  assert full.forward[:, 0].tolist() == [4, 5]
  assert ticks.tick_times(full, AGAIN).tolist() == [4, 4]
  assert ticks.busy_time(full, AGAIN) == pytest.approx((4 * (J - 1) + 3) / 12)
  # 3 (J - 1) = 6.
  at = lambda m: ticks.time_per_micro_batch(
    traced("1f1b", micro_batches=m), KEPT
  )
  assert [at(m) for m in (5, 6, 7)] == pytest.approx([4.2, 4.0, 27 / 7])


def test_gpipe_waits_for_the_last_stage_where_graphs_are_kept():
  found = traced("gpipe")
  phase = M + J - 1
  # The last stage goes forward on the way back: 3, beside 3 or 2 elsewhere.
  assert ticks.tick_times(found, AGAIN).sum() == (phase - 1) + 3 * phase
  kept = (phase - 1) + 3 * M + 2 * (J - 1)
  assert ticks.tick_times(found, KEPT).sum() == kept


def test_in_flight_are_those_between_a_stages_two_passes():
  assert traced("1f1b", micro_batches=9).in_flight == 2 * (J - 1)
  assert traced("gpipe", micro_batches=9).in_flight == 9


def test_passes_of_a_stage_never_overlap_and_lie_within_their_tick():
  found = traced("petra", micro_batches=6)
  ends = ticks.tick_times(found, AGAIN).cumsum()
  for stage in range(J):
    at = 0.0
    for p in ticks.passes(found, AGAIN):
      if p.stage == stage:
        begin = ends[p.tick - 1] if p.tick else 0.0
        assert p.start >= max(at, begin)
        at = p.start + p.length
        assert at <= ends[p.tick]


def test_refusals_say_what_to_do():
  loss = lambda params, batch, key: (0.0 * params.sum(), {})
  plain = dj.simulate(dj.ddp(loss, optax.sgd(0.1)), workers=2)
  with pytest.raises(ValueError, match="ddp is no pipeline of its own"):
    ticks.trace(plain, None, None, KEY)
  with pytest.raises(ValueError, match="more micro-batches than 2"):
    ticks.when_full(traced("petra", micro_batches=3))
