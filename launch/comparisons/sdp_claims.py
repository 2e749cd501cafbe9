"""What SDP promises of a compiled step, and the tables of launch/compare_sdp.py.

Rows are dicts as they are kept: see `comparisons.sdp.measured`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from distrain_jax.inspect.table import bytes_text

Found = dict[str, Any]

# Of peak memory, below DDP's: by preset and coverage.
SAVED = {
  "134M": {"1/2": 0.25, "1/4": 0.40},
  "1B": {"1/2": 0.40, "1/4": 0.60},
}
TOLERANCE = 0.05


def no_room(message: str) -> str:
  """A compiler's refusal in few words.

  >>> no_room("RESOURCE_EXHAUSTED: Used 19.3G of 15.75G hbm. Exceeded ...")
  'no room: 19.3G of 15.75G'
  """
  used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
  if used:
    return f"no room: {used[1]} of {used[2]}"
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return f"no room: {lines[0].removeprefix('RESOURCE_EXHAUSTED: ')}"


def shared_wire(x: Found) -> float:
  """Bytes that a worker sends of an all-reduce of the shared parameters."""
  n = x["workers"]
  return 2 * (n - 1) / n * 4 * x["shared"]


def sampled_flops(x: Found, ddp: Found) -> float:
  """Of what is sampled, over DDP's of the same; to be the coverage."""
  head = ddp["head_flops"]
  return (x["flops"] - head) / (ddp["flops"] - head)


def sampled_wire(x: Found, ddp: Found) -> float:
  """Bytes sent of what is sampled, over DDP's of the same."""
  shared = shared_wire(x)
  return (x["wire"] - shared) / (ddp["wire"] - shared)


def wanted_wire(x: Found) -> float:
  """(C N - 1) / (N - 1)."""
  n = x["workers"]
  return (Fraction(x["coverage"]) * n - 1) / (n - 1)


def claims(preset: str, rows: Sequence[Found]) -> list[str]:
  """A sentence a claim, of all rows of one preset and topology."""
  return [text for _, text in judged(preset, rows)]


def judged(preset: str, rows: Sequence[Found]) -> list[tuple[bool | None, str]]:
  """(whether it holds, the sentence); None: there is nothing to compare."""
  by_name = {x["name"]: x for x in rows}
  ddp = by_name.get("DDP", {"refused": "not compiled"})
  if "refused" in ddp:
    return [(None, f"Nothing to compare with: DDP, {ddp['refused']}.")]
  sdp = [x for x in rows if x["level"] and x["name"].count(",") == 0]
  done = [x for x in sdp if "refused" not in x]
  found = [_memory(x, ddp, SAVED.get(preset, {})) for x in done]
  found += [
    _near(x, "FLOPs of the masked layers", value, Fraction(x["coverage"]))
    for x in done
    for value in [sampled_flops(x, ddp)]
  ]
  found += [
    _near(x, "bytes sent of sampled parameters", value, wanted_wire(x))
    for x in done
    for value in [sampled_wire(x, ddp)]
  ]
  sent = {x["name"]: x["on_activations"] for x in done if x["on_activations"]}
  told = (f"{name}: {len(c)}, such as {c[0]}" for name, c in sent.items())
  told = "; ".join(told) or "none"
  if done:
    found.append(_said(not sent, f"collectives of activations: {told}"))
  found += [
    (None, f"{x['name']} refused: {x['refused']}")
    for x in sdp
    if "refused" in x
  ]
  return [pair for pair in found if pair is not None]


def _memory(x: Found, ddp: Found, goals: dict[str, float]):
  goal = goals.get(x["coverage"])
  if goal is None:
    return None
  saved = 1 - x["peak"] / ddp["peak"]
  text = (
    f"{x['name']}: peak memory {saved:.1%} below DDP's, at least {goal:.0%}"
  )
  return _said(saved >= goal, text)


def _near(x: Found, what: str, value: float, wanted):
  good = abs(value - wanted) <= TOLERANCE * wanted
  text = f"{x['name']}: {what} {value:.4f} of DDP's, wanted {float(wanted):.4f}"
  return _said(good, text)


def _said(good: bool, text: str) -> tuple[bool, str]:
  return good, f"{'holds' if good else 'DOES NOT HOLD'}: {text}"


HEADERS = ("peak", "of DDP's", "state", "TFLOP", "of DDP's", "sampled")
HEADERS += ("sent", "of DDP's", "activations sent")


def markdown(rows: Sequence[Found]) -> str:
  """A row each: of one device, and over what it is compared with."""
  by_name = {x["name"]: x for x in rows}
  lines = [("", *HEADERS), ("---", *["---:"] * len(HEADERS))]
  for x in rows:
    if "refused" in x:
      lines.append((x["name"], f"refused: {x['refused']}", *[""] * 8))
    else:
      lines.append((x["name"], *_cells(x, by_name.get(x["against"], {}))))
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(x: Found, base: Found) -> list[str]:
  def ratio(field: str) -> str:
    return f"{x[field] / base[field]:.3f}" if field in base else ""

  sampled = ""
  if x["level"] and "flops" in base:
    sampled = f"{sampled_flops(x, base):.3f}"
  return [
    bytes_text(x["peak"]),
    ratio("peak"),
    bytes_text(x["state"]),
    f"{x['flops'] / 1e12:.3f}",
    ratio("flops"),
    sampled,
    bytes_text(x["wire"]),
    ratio("wire"),
    _sends_activations(x),
  ]


def _sends_activations(x: Found) -> str:
  if not x["on_activations"]:
    return "no"
  # What FSDP gathers inside of the loss may be as long as a row by chance.
  return "yes" if x["level"] else "?"
