"""What is drawn is what the report says; pixels are for people to look at."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrain_jax.inspect import picture
from distrain_jax.inspect.schedule import Event

spec = importlib.util.spec_from_file_location(
  "made", Path(__file__).parent / "made.py"
)
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
MIB = made.MIB


def panels(*reports):
  return {
    axes.get_label(): axes for axes in picture.figure(reports, title="t").axes
  }


def bars(axes):
  """colour -> sorted (start, end, lowest, highest) of its bars."""
  found = {}
  for collection in axes.collections:
    colour = tuple(np.round(collection.get_facecolor()[0], 3))
    for path in collection.get_paths():
      box = path.get_extents()
      bar = tuple(float(v) for v in np.round((box.x0, box.x1, box.y0), 6))
      found.setdefault(colour, []).append(bar)
  return {colour: sorted(some) for colour, some in found.items()}


def rgba(colour):
  from matplotlib.colors import to_rgba

  return tuple(np.round(to_rgba(colour), 3))


def test_every_event_is_a_bar_of_its_kind_in_the_row_of_its_stream():
  drawn = bars(panels(made.report())["ddp"])
  rows = {"compute": -0.36, "communication": -1.36, "memory": -2.36}
  for kind, colour in picture.KINDS.items():
    expected = sorted(
      (1e3 * e.start, 1e3 * (e.start + e.seconds), rows[e.stream])
      for e in made.EVENTS
      if e.kind == kind
    )
    np.testing.assert_allclose(drawn.get(rgba(colour), []), expected)


def test_exposed_communication_is_underlined_and_hidden_is_not():
  drawn = bars(panels(made.report())["ddp"])[rgba(picture.EXPOSED)]
  assert [bar[:2] for bar in drawn] == [(5.0, 6.0), (7.0, 9.0)]
  seconds = sum(b - a for a, b in picture.exposed(made.EVENTS))
  assert seconds == pytest.approx(made.report().exposed_seconds)


def test_exposed_agrees_with_a_count_of_instants():
  rng = np.random.default_rng(0)
  streams = ("compute", "communication", "memory")
  events = [
    Event(streams[rng.integers(3)], "x", int(start), int(length))
    for start, length in zip(rng.integers(0, 200, 60), rng.integers(1, 12, 60))
  ]
  busy = {stream: np.zeros(220, bool) for stream in streams}
  for e in events:
    busy[e.stream][e.start : e.start + e.seconds] = True
  told = np.zeros(220, bool)
  intervals = picture.exposed(events)
  for a, b in intervals:
    assert not told[a:b].any()
    told[a:b] = True
  expected = busy["communication"] & ~busy["compute"]
  np.testing.assert_array_equal(told, expected)
  assert expected.any() and not expected.all()


def test_timelines_that_are_compared_share_one_scale_and_say_their_unit():
  short = made.STEP._replace(seconds=0.005)
  found = panels(made.report(), made.report("zero1", step=short))
  assert found["ddp"].get_xlim() == found["zero1"].get_xlim()
  assert found["zero1"].get_xlabel() == "ms from the start of the step"
  title = found["ddp"].get_title(loc="left")
  assert title == (
    "ddp on v5e:2x2: 10.00 ms a step = 6.00 compute + 3.00 exposed "
    "communication + 1.00 waiting for copies; 3.00 of communication hidden"
  )


def test_memory_is_stacked_by_kind_up_to_the_peak():
  small = made.memory({"step": 4, "params": 64 * MIB, "shard": 32 * MIB})
  axes = panels(made.report(), made.report("zero1", memory=small))["memory"]
  drawn = {
    bars.get_label(): [(b.get_x(), b.get_width()) for b in bars]
    for bars in axes.containers
  }
  assert drawn == {
    "state: params": [(0, 64), (0, 64)],
    "state: opt_state": [(64, 128), (64, 0)],
    "state: shard": [(192, 0), (64, 32)],
    "temporaries like gradients (estimate)": [(192, 32), (96, 0)],
    "activations, workspace (estimate)": [(224, 16), (96, 0)],
    picture.REST: [
      (240, pytest.approx(1 + 4 / MIB)),
      (96, pytest.approx(4 / MIB)),
    ],
  }
  assert [t.get_text() for t in axes.get_yticklabels()] == ["ddp", "zero1"]
  texts = [t.get_text() for t in axes.texts]
  assert texts == ["241.00 MiB", "96.00 MiB"]
  assert axes.get_xlabel() == "MiB per device at the peak; v5e has 16.00 GiB"


def test_the_chips_memory_is_a_line_where_it_is_in_range():
  large = made.memory({"params": 15 << 30})
  axes = panels(made.report(memory=large))["memory"]
  assert [line.get_xdata()[0] for line in axes.lines] == [16]
  assert axes.get_xlim()[1] > 16
  assert "v5e has 16.00 GiB" in [t.get_text() for t in axes.texts]
  assert not panels(made.report())["memory"].lines


def test_the_caption_says_what_the_times_are_made_of():
  caption = picture.figure([made.report()]).get_supxlabel()
  assert caption.startswith("Model, not measurement: v5e at its published")
  both = [made.report(), made.report(chip="h100"), made.report("zero1")]
  caption = picture.figure(both).get_supxlabel()
  assert caption.count("Model, not measurement") == 2


def test_without_peaks_there_is_memory_and_no_timeline():
  still = made.STEP._replace(seconds=0.0, compute_seconds=0.0, events=())
  cpu = made.report(chip=None, step=still)
  assert list(panels(cpu)) == ["memory"]
  assert "No timeline" in picture.figure([cpu]).get_supxlabel()


def test_a_program_that_says_nothing_and_holds_nothing_is_drawn(tmp_path):
  step = made.STEP._replace(communication=(), events=made.EVENTS[:1])
  idle = made.report(step=step, memory=made.memory({}))
  picture.save([idle], tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 1000


def test_thousands_of_bars_are_one_artist_a_kind(tmp_path):
  kinds = ("matrix products", "other compute")
  events = [
    Event("compute", kinds[i % 2], i * 1e-6, 1e-6) for i in range(20_000)
  ]
  many = made.report(step=made.STEP._replace(events=tuple(events)))
  axes = panels(many)["ddp"]
  assert [len(c.get_paths()) for c in axes.collections] == [10_000, 10_000]
  picture.save([many], tmp_path / "many.png", title="many")
  with Image.open(tmp_path / "many.png") as image:
    assert image.format == "PNG" and image.size[0] > 1000


def test_no_reports_is_an_error():
  with pytest.raises(ValueError, match="no reports"):
    picture.figure([])
