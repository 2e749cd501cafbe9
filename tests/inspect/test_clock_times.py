"""The seconds that a clock is given: by hand, scaled, from a compiled step."""

import pytest

from distrain_jax.inspect import clock

K = 4  # micro-batches


def test_scaled_times_have_the_ratio_and_keep_their_proportions():
  given = clock.times(
    2,
    micro_batch=0.25,
    reduce_scatter=0.1,
    all_gather=0.3,
    update=0.1,
    slow={0: 2.0},
  )
  scaled = given.at_ratio(3.0, K)
  assert scaled.exchange == pytest.approx(3.0 * 2.0)
  assert scaled.update / scaled.exchange == pytest.approx(0.1 / 0.5)
  assert scaled.micro_batch == given.micro_batch
  free = clock.times(2, micro_batch=0.25, reduce_scatter=0, all_gather=0)
  bare = free.at_ratio(0.5, K)
  assert bare.exchange == pytest.approx(0.5)
  assert bare.reduce_scatter == bare.all_gather


def reported(name, collectives, **more):
  """What `Report.to_json` keeps of these: (kind, seconds, runs, sliced)."""
  keys = ("kind", "seconds", "runs", "each_keeps_a_part")
  return {
    "name": name,
    "hardware": "v5e:2x4",
    "devices": 8,
    "model": {"step_seconds": 3.0, "compute_seconds": 2.0},
    "collectives": [dict(zip(keys, c)) for c in collectives],
    **more,
  }


def test_a_compiled_program_gives_the_times():
  scatter, gather = (
    ("reduce-scatter", 0.1, 2, False),
    ("all-gather", 0.4, 1, False),
  )
  of = lambda *given: clock.from_report(reported(*given), 4)
  times = of("zero1", [scatter, gather])
  assert times == clock.times(
    8, micro_batch=0.5, reduce_scatter=0.2, all_gather=0.4
  )
  twice = [("reduce-scatter", 0.1, 4, False), ("all-gather", 0.4, 2, False)]
  assert of("acco", twice) == times
  # An all-reduce is both; one of which each keeps a part was to be a scatter.
  reduced = of("ddp", [("all-reduce", 0.6, 1, False)])
  assert reduced.reduce_scatter == reduced.all_gather == (0.3,) * 8
  sliced = of("zero1", [("all-reduce", 0.2, 1, True), gather])
  assert sliced == times


BAD_REPORTS = {
  "exchange's seconds; those of ddp, zero1": reported("fsdp", []),
  "has no times": reported("ddp", [], model={"step_seconds": 0.0}),
  "ddp on v5e:1x1 has no times": {
    "name": "ddp",
    "hardware": "v5e:1x1",
    "refused": "no room",
  },
}


@pytest.mark.parametrize("message", BAD_REPORTS)
def test_a_report_that_does_not_fit_is_refused(message):
  with pytest.raises(ValueError, match=message):
    clock.from_report(BAD_REPORTS[message], 4)


BAD_TIMES = {
  "`workers` is a whole number": {"workers": 0},
  "`micro_batch` has 3 numbers for 2 workers": {"micro_batch": [1, 1, 1]},
  "`micro_batch` is in seconds, above 0": {"micro_batch": 0.0},
  "`all_gather` is finite and not negative": {"all_gather": -1.0},
  "`update` is finite": {"update": float("nan")},
  "worker 2, but the 2 workers are 0 to 1": {"slow": {2: 4.0}},
  "factors above 0, such as 4; got 0": {"slow": {1: 0.0}},
}


@pytest.mark.parametrize("message", BAD_TIMES)
def test_times_that_cannot_be_are_refused(message):
  good = {"micro_batch": 1.0, "reduce_scatter": 1.0, "all_gather": 1.0}
  given = {"workers": 2, **good, **BAD_TIMES[message]}
  with pytest.raises(ValueError, match=message):
    clock.times(given.pop("workers"), **given)
