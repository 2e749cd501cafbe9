"""The advisor's table says what its reports say, in one unit a column."""

import importlib.util
from pathlib import Path

import pytest

from distrain_jax.inspect import advisor

spec = importlib.util.spec_from_file_location(
  "made", Path(__file__).parent / "made.py"
)
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
MIB = made.MIB


def test_a_row_per_method_in_one_unit_a_column():
  fast = made.STEP._replace(
    seconds=0.0049, communication=made.SPEAKS[1:], flops={"bf16": 197e9 / 2}
  )
  small = made.memory({"params": 512 << 10})
  table = advisor.compare(
    [made.report(), made.report("zero1", step=fast, memory=small)]
  )
  assert table.splitlines() == [
    "method  hardware  peak, MiB  state, MiB  sent a step, MiB  exposed, ms  a step, ms  utilisation  fits",
    "------  --------  ---------  ----------  ----------------  -----------  ----------  -----------  ----",
    "ddp     v5e:2x2      241.00      192.00              9.00         3.00       10.00       10.0 %   yes",
    "zero1   v5e:2x2        0.50        0.50              6.00         2.00        4.90       10.2 %   yes",
  ]


def test_what_is_larger_than_the_chip_does_not_fit():
  limit = made.report().chip.memory_bytes
  peak = lambda size: made.report(memory=made.memory({"params": size}))
  assert advisor.fits(peak(limit)) is True
  assert advisor.fits(peak(limit + 1)) is False
  assert advisor.compare([peak(limit + 1)]).endswith(" no")
  assert advisor.fits(made.report(chip=None)) is None


def test_without_peaks_there_are_no_columns_of_times():
  table = advisor.compare([made.report(chip=None)])
  head, _, row = table.splitlines()
  assert head.split("  ")[-1] == "sent a step, MiB"
  assert row.split() == ["ddp", "cpu", "241.00", "192.00", "9.00"]


def test_a_refused_program_is_a_row_and_a_reason():
  refusal = advisor.Refusal("ddp", "v5e:2x2", "Ran out of memory.")
  table, note = advisor.compare([refusal, made.report("zero1")]).split("\n\n")
  assert table.splitlines()[2].split() == ["ddp", "v5e:2x2", "no"]
  assert note == "ddp on v5e:2x2 was refused: Ran out of memory."
  assert refusal.to_json()["refused"] == "Ran out of memory."
  assert advisor.compare([refusal]).splitlines()[0].split()[-1] == "fits"


def test_what_the_compiler_did_wrong_and_what_is_not_counted_is_told():
  spoiled = made.SPEAKS[1]._replace(
    collective=made.collective("all-reduce", 6 * MIB, sliced=True)
  )
  step = made.STEP._replace(communication=(spoiled,), unknown=("a loop",))
  table, *notes = advisor.compare([made.report(step=step)]).split("\n\n")
  assert table.splitlines()[2].startswith("ddp *")
  assert notes[0].startswith(
    "* ddp on v5e:2x2: the compiler made an all-reduce"
  )
  assert notes[1] == "ddp on v5e:2x2, not counted: a loop."


@pytest.mark.parametrize(
  ("seconds", "unit"), [(0, "µs"), (9e-4, "µs"), (1e-3, "ms"), (5.0, "ms")]
)
def test_short_times_are_in_microseconds(seconds, unit):
  assert advisor.time_unit(seconds)[1] == unit


@pytest.mark.parametrize(
  ("size", "unit"), [(0, "B"), (1023, "B"), (1024, "KiB"), (2**60, "PiB")]
)
def test_sizes_are_in_the_largest_unit_that_they_reach(size, unit):
  assert advisor.in_unit(size)[1] == unit
