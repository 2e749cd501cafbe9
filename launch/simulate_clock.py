r"""How many updates a second each method makes, from a few measured seconds.

  python launch/simulate_clock.py                            # ten seconds
  python launch/simulate_clock.py --workers=8 --micro_batch=0.12 \
    --reduce_scatter=0.05 --all_gather=0.05 --slow=7:2 --jitter=0.1
  python launch/simulate_clock.py --report=runs/compile/NAME/report.json

Simulates the workers' streams event by event (distrain_jax/inspect/clock): a
table for the workers as given, and one with those of --slow; a picture of time
against the ratio of communication to compute, and one of a few rounds. Writes
clock.json, clock_ratio.png and clock_gantt.png. With --report, times are those
that launch/compile.py modelled for a real program.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from distrain_jax.inspect import clock, table
from distrain_jax.inspect.clock import picture

WORKERS = flags.DEFINE_integer("workers", 4, "How many.", 1)
MICRO_BATCH = flags.DEFINE_list(
  "micro_batch", ["0.1"], "Seconds of forward and backward: one, or for each."
)
SCATTER = flags.DEFINE_list(
  "reduce_scatter", ["0.1"], "Seconds, of the model: one, or by each's link."
)
GATHER = flags.DEFINE_list("all_gather", ["0.1"], "The same.")
UPDATE = flags.DEFINE_float(
  "update", 0.0, "Seconds of a shard's update, 1/N of the model's.", 0
)
SLOW = flags.DEFINE_list(
  "slow", ["0:4"], "WORKER:FACTOR of slow ones, for a second table."
)
REPORT = flags.DEFINE_string(
  "report", None, "report.json of launch/compile.py, in place of seconds."
)
ACCUMULATE = flags.DEFINE_integer(
  "accumulate", 4, "Micro-batches of an update on each worker.", 1
)
UPDATES = flags.DEFINE_integer("updates", 32, "Timed, of each method.", 1)
SYNC_EVERY = flags.DEFINE_integer(
  "sync_every", 30, "Inner steps between exchanges of the local methods.", 1
)
FRAGMENTS = flags.DEFINE_integer("fragments", 3, "Of streaming_diloco.", 1)
DELAY = flags.DEFINE_integer("delay", 5, "Its inner steps beside each.", 1)
BUCKETS = flags.DEFINE_integer("buckets", 16, "Of ddp_buckets.", 1)
JITTER = flags.DEFINE_float(
  "jitter", 0.0, "Of the logarithm of a micro-batch's seconds.", 0
)
SEED = flags.DEFINE_integer("seed", 0, "Of the jitter.")
TOKENS = flags.DEFINE_integer(
  "tokens", None, "Of a micro-batch: adds tokens a second to the table.", 1
)
OUT = flags.DEFINE_string("out", "runs/clock", "Folder of the files.")

RATIOS = [2 ** (i / 4) for i in range(-16, 13)]  # 1/16 to 8, with 1/2 and 1
GANTT = ("zero1", "dpu", "acco"), ("zero1", "acco", "acco_adaptive")
TRUTHS = """\
An exchange is a reduce-scatter and an all-gather of the whole model: the two of
acco are twice the bytes of zero1 or dpu. Adaptive methods fill their waiting
with a larger batch: more gradients a second, not more updates. The mean counts
each micro-batch once, so a fast worker's data weigh more (weight: of a worker's
data in an update, least to most). An update of local_sgd and the DiLoCos is a
step of each worker's own model. A model, not a measurement: exchanges slow no
compute beside them."""


class Case(NamedTuple):
  """Some workers, and what each method makes of them."""

  name: str
  times: clock.Times
  outcomes: dict[str, clock.Outcome]


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  try:
    cases = [
      Case(name, times, {m: simulate(m, times) for m in clock.METHODS})
      for name, times in given()
    ]
  except (ValueError, OSError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  for case in cases:
    print(f"{heading(case)}\n\n{text(case.outcomes)}\n")
  print(TRUTHS)
  sweep = against_ratio(cases[0].times)
  print(f"\n{verdict(sweep)}")
  for case in cases[1:]:
    print(free_wire(case))
  keep(cases, sweep, Path(OUT.value))


def simulate(method: str, times: clock.Times) -> clock.Outcome:
  flagged = (ACCUMULATE, UPDATES, SYNC_EVERY, FRAGMENTS, DELAY, BUCKETS)
  options = {flag.name: flag.value for flag in (*flagged, JITTER, SEED)}
  return clock.simulate(method, times, **options)


def given() -> list[tuple[str, clock.Times]]:
  """The workers as they are, and those of --slow."""
  name, times = reported() if REPORT.value else by_hand()
  found = [(name, times)]
  if SLOW.value:
    workers = ", ".join(f"worker {x.replace(':', ' by ')}" for x in SLOW.value)
    slow = clock.times(
      len(times.micro_batch),
      **times._asdict(),
      slow=dict(map(pair, SLOW.value)),
    )
    found.append((f"{name}, slowed: {workers}", slow))
  return found


def by_hand() -> tuple[str, clock.Times]:
  times = clock.times(
    WORKERS.value,
    micro_batch=numbers(MICRO_BATCH),
    reduce_scatter=numbers(SCATTER),
    all_gather=numbers(GATHER),
    update=UPDATE.value,
  )
  return f"{WORKERS.value} workers", times


def numbers(flag) -> float | list[float]:
  """One for all workers, or one for each."""
  try:
    found = [float(x) for x in flag.value]
  except ValueError:
    raise ValueError(
      f"--{flag.name}: one number for all workers or one for each, with commas; "
      f"got {','.join(flag.value)!r}."
    ) from None
  return found[0] if len(found) == 1 else found


def pair(item: str) -> tuple[int, float]:
  """A worker and its factor."""
  worker, _, factor = item.partition(":")
  try:
    return int(worker), float(factor)
  except ValueError:
    raise ValueError(
      f"--slow: WORKER:FACTOR, e.g. 0:4,2:1.5; got {item!r}."
    ) from None


def reported() -> tuple[str, clock.Times]:
  """A report's program; ZeRO-1's where it is: it exchanges once and plainly."""
  file = json.loads(Path(REPORT.value).read_text())
  if not isinstance(file, dict) or not file.get("reports"):
    raise ValueError(
      f"--report: {REPORT.value} is no report.json of launch/compile.py."
    )
  rank = {"zero1": 0} | {m: 1 for m in clock.REPORTED if m != "zero1"}
  best = min(file["reports"], key=lambda r: rank.get(r["name"], 2))
  name = f"{best['name']} of {file['config_file']} on {best['hardware']}"
  return name, clock.from_report(best, ACCUMULATE.value)


def heading(case: Case) -> str:
  t = case.times
  compute = ACCUMULATE.value * max(t.micro_batch)
  return (
    f"{case.name}: {ACCUMULATE.value} micro-batches an update, Tc = "
    f"{compute:.4g} s on the slowest worker; Tm = {t.exchange:.4g} s "
    f"(reduce-scatter {max(t.reduce_scatter):.4g}, update {t.update:.4g}, "
    f"all-gather {max(t.all_gather):.4g}); Tm / Tc = {t.exchange / compute:.3g}"
  )


def text(outcomes: dict[str, clock.Outcome]) -> str:
  headers = ["method", "update, s", "updates/s", "micro-batches/s"]
  headers += ["tokens/s"] if TOKENS.value else []
  headers += ["over zero1", "micro-batches", "exchanges", "busy, %", "weight"]
  base = outcomes["zero1"].micro_batches_per_second
  rows = []
  for method, o in outcomes.items():
    rate = o.micro_batches_per_second
    rows.append(
      [
        method,
        f"{o.update_seconds:.4g}",
        f"{o.updates_per_second:.4g}",
        f"{rate:.4g}",
        *([f"{rate * TOKENS.value:,.0f}"] if TOKENS.value else []),
        f"{rate / base:.2f}",
        f"{sum(o.micro_batches):.1f}",
        f"{o.exchanges:.2f}",
        span((100 * u for u in o.utilisation), ".0f"),
        span(o.weights),
      ]
    )
  return table.render(headers, rows, "l" + "r" * (len(headers) - 1))


def span(values, form: str = ".3f") -> str:
  """Least to most, once where they print alike."""
  ends = sorted(values)
  texts = dict.fromkeys(f"{x:{form}}" for x in (ends[0], ends[-1]))
  return " to ".join(texts)


def against_ratio(times: clock.Times) -> dict[str, list[clock.Outcome]]:
  """Each method at each of the RATIOS."""
  at = [times.at_ratio(r, ACCUMULATE.value) for r in RATIOS]
  return {m: [simulate(m, t) for t in at] for m in clock.METHODS}


def verdict(sweep: dict[str, list[clock.Outcome]]) -> str:
  """What the sweep says of ACCO, in words."""
  pairs = zip(sweep["zero1"], sweep["acco"])
  gain = [a.update_seconds / b.update_seconds for a, b in pairs]
  best = max(range(len(gain)), key=gain.__getitem__)
  even = [r for r, x in zip(RATIOS[best:], gain[best:]) if x <= 1 + 1e-9]
  return (
    f"acco over zero1 at the same batch, Tm / Tc from {RATIOS[0]:g} to "
    f"{RATIOS[-1]:g}: at most {gain[best]:.2f} times as fast, where it is "
    f"{RATIOS[best]:.2g}; "
    + (f"no faster from {even[0]:.2g} on." if even else "faster everywhere.")
  )


def free_wire(case: Case) -> str:
  """What the adaptive loop gains where nothing but waiting is to be saved."""
  free = (0.0,) * len(case.times.micro_batch)
  times = clock.Times(case.times.micro_batch, free, free)
  plain, adaptive = (simulate(m, times) for m in ("ddp", "acco_adaptive"))
  rate = adaptive.micro_batches_per_second / plain.micro_batches_per_second
  return (
    f"{case.name}, were exchanges free: acco_adaptive makes {rate:.2f} times "
    f"ddp's gradients a second; a worker's weight is {span(adaptive.weights)}, "
    f"ddp's {span(plain.weights)}."
  )


def keep(cases: list[Case], sweep, folder: Path) -> None:
  """clock.json, clock_ratio.png and clock_gantt.png."""
  folder.mkdir(parents=True, exist_ok=True)
  kept = {
    "accumulate": ACCUMULATE.value,
    "cases": [as_json(case) for case in cases],
    "ratios": RATIOS,
    "sweep": {m: curves(x) for m, x in sweep.items()},
  }
  (folder / "clock.json").write_text(json.dumps(kept, indent=1) + "\n")
  compute = ACCUMULATE.value * max(cases[0].times.micro_batch)
  n = len(cases[0].times.micro_batch)
  batch = f"{n} workers, {ACCUMULATE.value} micro-batches an update on each"
  title = f"{batch}; Tm: reduce-scatter + update + all-gather, once"
  picture.ratio(sweep, RATIOS, compute, folder / "clock_ratio.png", title=title)
  columns = [
    (case.name, [(m, case.outcomes[m]) for m in names], rounds(case))
    for case, names in zip(cases, GANTT)
  ]
  picture.gantt(columns, folder / "clock_gantt.png", title=batch)
  for name in ("clock.json", "clock_ratio.png", "clock_gantt.png"):
    print(f"wrote {folder / name}")


def as_json(case: Case) -> dict:
  outcomes = {m: means(o) for m, o in case.outcomes.items()}
  return {"name": case.name, "times": case.times._asdict(), "methods": outcomes}


def means(o: clock.Outcome) -> dict:
  """Without every update and every bar."""
  return {
    "update_seconds": o.update_seconds,
    "micro_batches_per_second": o.micro_batches_per_second,
    "micro_batches": o.micro_batches,
    "weights": o.weights,
    "exchanges": o.exchanges,
    "utilisation": o.utilisation,
  }


def curves(outcomes: list[clock.Outcome]) -> dict[str, list[float]]:
  """One number a ratio, to six digits."""
  names = ("update_seconds", "micro_batches_per_second")
  digits = lambda x: float(f"{x:.6g}")
  return {n: [digits(getattr(o, n)) for o in outcomes] for n in names}


def rounds(case: Case) -> float:
  """Seconds of three of zero1's updates."""
  return 3 * case.outcomes["zero1"].update_seconds


if __name__ == "__main__":
  app.run(main)
