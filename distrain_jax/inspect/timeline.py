"""The bars of a step's timeline, few enough to draw."""

from distrain_jax.inspect.step import Event

MOST = 3000  # bars of a loop; those of longer ones become coarser


def add(events: list[Event], event: Event) -> None:
  """Appends a bar, or lengthens the last one if this continues it."""
  if event.seconds <= 0:
    return
  if events:
    last = events[-1]
    same = (last.stream, last.kind) == (event.stream, event.kind)
    if same and last.start + last.seconds >= event.start - 1e-12:
      end = max(last.start + last.seconds, event.start + event.seconds)
      events[-1] = last._replace(seconds=end - last.start)
      return
  events.append(event)


def repeat(
  events: list[Event], inside: list[Event], once: float, trips: int
) -> None:
  """Appends the bars of a loop: `trips` times those inside, `once` s each."""
  inside = _coarse(inside, MOST // trips)
  if trips > MOST:  # a bar a stream, as long as all of them together
    inside = [e._replace(seconds=e.seconds * trips) for e in inside]
    trips = 1
  for i in range(trips):
    for event in inside:
      add(events, event._replace(start=event.start + i * once))


def _coarse(events: list[Event], most: int) -> list[Event]:
  """At most so many events: neighbours on a stream become one bar."""
  streams: dict[str, list[Event]] = {}
  for event in events:
    streams.setdefault(event.stream, []).append(event)
  step = -(-len(events) // max(1, most))
  out = []
  for group in streams.values():
    for i in range(0, len(group), step):
      part = group[i : i + step]
      largest = max(part, key=lambda e: e.seconds)
      busy = sum(e.seconds for e in part)
      out.append(largest._replace(start=part[0].start, seconds=busy))
  return sorted(out, key=lambda e: e.start)
