"""The clock against closed forms, a recurrence, and what must be conserved."""

import itertools

import numpy as np
import pytest

from distrain_jax.inspect import clock

K, N = 4, 4  # micro-batches an update on each worker, workers
RATIOS = [1 / 16, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 4]


def equal(ratio=0.5, update=0.0, **more):
  """Equal workers: Tc is 1 second, an exchange `ratio`, a third scatters."""
  wire = ratio - update
  return clock.times(
    N,
    micro_batch=1 / K,
    reduce_scatter=wire / 3,
    all_gather=2 * wire / 3,
    update=update,
    **more,
  )


def run(method, times, **options):
  return clock.simulate(method, times, **{"accumulate": K, **options})


def hidden(tm, tc=1.0, buckets=16):
  """DDP whose buckets leave during the last two thirds of a micro-batch."""
  m = tc / K
  first = tc - 2 / 3 * m + 2 / 3 * m / buckets
  return max(tc + tm / buckets, first + tm)


# Seconds of an update by Tm, u of which updates a shard: by hand.
FORMS = {
  "zero1": lambda tm, u: 1 + tm,
  "ddp": lambda tm, u: 1 + tm + (N - 1) * u,
  "ddp_buckets": lambda tm, u: hidden(tm - u) + N * u,
  "acco": lambda tm, u: max(1, 2 * tm),
  "dpu": lambda tm, u: max(1, tm),
  "weight_prediction": lambda tm, u: max(1, tm + u),
  "local_sgd": lambda tm, u: 1 + N * u + (tm - u) / 30,
  "diloco": lambda tm, u: 1 + N * u + (tm - u + N * u) / 30,
}


@pytest.mark.parametrize("update", [0.0, 1 / 32])
@pytest.mark.parametrize("method", FORMS)
def test_equal_workers_take_the_time_of_the_closed_form(method, update):
  for ratio in RATIOS:
    found = run(method, equal(ratio, update))
    expected = FORMS[method](ratio, update)
    np.testing.assert_allclose(found.update_seconds, expected, rtol=1e-9)
    assert found.micro_batches == (K,) * N
    np.testing.assert_allclose(found.utilisation, 1 / expected, rtol=1e-6)


def test_acco_gains_half_at_most_and_loses_where_the_wire_outweighs():
  gains = {}
  for ratio in [i / 16 for i in range(1, 49)]:
    plain, acco = (run(m, equal(ratio)) for m in ("zero1", "acco"))
    gains[ratio] = plain.update_seconds / acco.update_seconds
  assert max(gains, key=gains.__getitem__) == 0.5
  np.testing.assert_allclose(max(gains.values()), 1.5)
  for ratio, gain in gains.items():
    assert (gain < 1 - 1e-9) == (ratio > 1)
    np.testing.assert_allclose(gain, (1 + ratio) / max(1, 2 * ratio))


@pytest.mark.parametrize("method", ["acco", "dpu"])
def test_the_adaptive_loop_adds_nothing_where_nobody_waits(method):
  """Also where exchange and compute end at the same moment."""
  for ratio in (0.0, 0.25, 0.5):
    adaptive = run(f"{method}_adaptive", equal(ratio))
    assert adaptive._replace(method=method) == run(method, equal(ratio))


def test_acco_sends_twice_and_local_methods_rarely():
  sent = {m: run(m, equal()).exchanges for m in clock.METHODS}
  expected = dict.fromkeys(clock.METHODS, 1.0)
  expected |= {"acco": 2.0, "acco_adaptive": 2.0}
  local = ("local_sgd", "diloco", "streaming_diloco")
  expected |= dict.fromkeys(local, 1 / 30)
  assert sent == pytest.approx(expected)


def test_one_slow_worker_of_four_leaves_the_adaptive_loop_3_25_times_the_rate():
  times = equal(0.0, slow={1: 4.0})
  plain, fixed, adaptive = (
    run(m, times) for m in ("ddp", "acco", "acco_adaptive")
  )
  rate = lambda o: o.micro_batches_per_second
  np.testing.assert_allclose(rate(adaptive) / rate(plain), 3.25)
  np.testing.assert_allclose(rate(fixed), rate(plain))
  np.testing.assert_allclose(plain.utilisation, [0.25, 1, 0.25, 0.25])
  np.testing.assert_allclose(adaptive.utilisation, 1)
  # No more updates: the batch is larger, and of other data.
  np.testing.assert_allclose(adaptive.update_seconds, plain.update_seconds)
  np.testing.assert_allclose(plain.weights, 1 / 4)
  np.testing.assert_allclose(adaptive.weights, [4 / 13, 1 / 13, 4 / 13, 4 / 13])


def test_the_adaptive_mean_counts_every_micro_batch_once():
  """Not a mean of workers' means, which would move the slow one's data up."""
  outcome = run("acco_adaptive", equal(0.3, slow={0: 3.0}), jitter=0.2)
  value = np.array([1.0, 2.0, 3.0, 4.0])  # of a gradient on each worker's data
  counts = np.array([u.counts for u in outcome.updates])  # (updates, n)
  steady = counts[8:40].sum(0)  # what the means are of
  weights = np.array(outcome.weights)
  np.testing.assert_allclose(weights @ value, (steady @ value) / steady.sum())
  assert np.ptp(counts[:, 1]) > 0 and steady[0] < steady[1:].min() / 2


@pytest.mark.parametrize("method", clock.METHODS)
def test_every_gradient_is_in_one_update_in_order(method):
  options = {"jitter": 0.3, "seed": 5, "sync_every": 6, "delay": 2}
  outcome = run(method, equal(0.7, slow={2: 2.5}), **options)
  for worker in range(N):
    ends = np.sort(
      [
        s.end
        for s in outcome.spans
        if s.worker == worker and s.what.startswith("micro-batch")
      ]
    )
    used = np.cumsum([u.counts[worker] for u in outcome.updates])
    assert 0 <= len(ends) - used[-1] <= 40  # the rest: not yet in an update
    # None is used before it is there, and none of them twice.
    assert all(
      ends[n - 1] <= u.end + 1e-12 for n, u in zip(used, outcome.updates)
    )
    least = K if worker == 2 else 1
    assert all(u.counts[worker] >= least for u in outcome.updates)


@pytest.mark.parametrize("method", clock.METHODS)
def test_a_stream_does_one_thing_at_a_time_and_collectives_are_common(method):
  outcome = run(method, equal(0.7, 0.05, slow={2: 2.5}), jitter=0.3)
  spans = sorted(outcome.spans, key=lambda s: (s.worker, s.stream, s.start))
  for a, b in itertools.pairwise(spans):
    if (a.worker, a.stream) == (b.worker, b.stream):
      assert a.end <= b.start + 1e-12
  wire = ("reduce-scatter", "all-gather", "all-reduce")
  each = [
    [
      (s.what, s.start, s.end)
      for s in spans
      if s.what in wire and s.worker == i
    ]
    for i in range(N)
  ]
  shortest = min(map(len, each))
  assert shortest and all(e[:shortest] == each[0][:shortest] for e in each)


def recurrence(draws, exchange, half):
  """When ACCO's exchanges end: max-plus by hand, of (n, many) seconds."""
  parts = draws[:, : draws.shape[1] // half * half].reshape(
    len(draws), -1, half
  )
  computed = parts[:, 0].sum(1)  # (n,), when each has its next gradients
  ends = []
  for part in parts[:, 1:].sum(2).T:
    ends.append(computed.max() + exchange)
    computed = np.maximum(computed + part, ends[-1])
  return ends


def test_acco_with_jitter_equals_a_recurrence():
  times = equal(0.4, slow={3: 1.5})
  outcome = run("acco", times, jitter=0.5, seed=3)
  draws = [
    [
      s.end - s.start
      for s in outcome.spans
      if s.worker == i and "micro" in s.what
    ]
    for i in range(N)
  ]
  many = min(map(len, draws))
  draws = np.array([d[:many] for d in draws])
  assert draws.std() > 0.05
  commits = recurrence(draws, 0.4, K // 2)[1::2]
  ends = [u.end for u in outcome.updates][: len(commits)]
  assert len(ends) > 30
  np.testing.assert_allclose(ends, commits[: len(ends)], rtol=1e-9)


def test_jitter_is_seeded_shared_by_the_methods_and_costs_those_who_wait():
  times = equal(0.1)
  a, b = (run("zero1", times, jitter=0.3, seed=1) for _ in range(2))
  other = run("zero1", times, jitter=0.3, seed=2)
  assert a == b and a.update_seconds != other.update_seconds
  first = lambda m: run(m, times, jitter=0.3, seed=1).spans[0]
  assert first("dpu") == first("zero1") == first("local_sgd")
  assert a.update_seconds > run("zero1", times).update_seconds
  rare = run("local_sgd", times, jitter=0.3, seed=1)
  assert rare.update_seconds - 0.1 / 30 < a.update_seconds - 0.1


def test_a_collective_is_as_slow_as_the_slowest_link():
  times = clock.times(
    3, micro_batch=1.0, reduce_scatter=[1, 2, 1], all_gather=[1, 1, 4]
  )
  assert clock.simulate("zero1", times).update_seconds == 4 + 2 + 4


def test_streaming_hides_each_fragment_behind_its_delay():
  seconds = lambda ratio, **options: (
    run(
      "streaming_diloco", equal(ratio), sync_every=12, **options
    ).update_seconds
  )
  assert seconds(6.0, fragments=3, delay=2) == pytest.approx(1)
  # A fragment of 3 seconds behind 2 steps: one second each, three in 12 steps.
  assert seconds(9.0, fragments=3, delay=2) == pytest.approx(1 + 3 / 12)
  assert seconds(9.0, fragments=3, delay=3) == pytest.approx(1)
  assert seconds(9.0, fragments=9, delay=1) == pytest.approx(1)


def test_estimates_are_gathered_before_gradients_are_taken_there():
  """A half begins when what it computes at has come: 40 % of it is idle."""
  spans = run("acco", equal(0.7)).spans
  mine = [s for s in spans if s.worker == 0]
  gathered = [s.end for s in mine if s.what == "all-gather"]
  at = [s for s in mine if s.what == "micro-batch at the estimate"]
  for n, s in enumerate(at):  # K / 2 of them in a half
    assert s.start >= gathered[2 * (n // (K // 2))] - 1e-12
  assert at[0].start == pytest.approx(0.5 + 0.7)


BAD_RUNS = {
  "'aco' is no method. Did you mean 'acco'": ("aco", {}),
  "`accumulate` is even; got 3, e.g. 4": ("acco", {"accumulate": 3}),
  "`accumulate` is a whole number of at least 1; got 0": (
    "ddp",
    {"accumulate": 0},
  ),
  "`updates` is a whole number": ("ddp", {"updates": 1.5}),
  "`sync_every` is a whole number": ("diloco", {"sync_every": 0}),
  "got fragments=3, delay=5 and sync_every=5": (
    "streaming_diloco",
    {"sync_every": 5},
  ),
  "`jitter` is the standard deviation": ("ddp", {"jitter": -1.0}),
}


@pytest.mark.parametrize("message", BAD_RUNS)
def test_a_run_that_cannot_be_is_refused(message):
  method, options = BAD_RUNS[message]
  with pytest.raises(ValueError, match=message):
    clock.simulate(method, equal(), **options)
