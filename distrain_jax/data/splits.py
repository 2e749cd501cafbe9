"""Which split a record belongs to, decided by a hash of its content or name.

A hash needs no seed and no order: the same document is in the same split on
every machine, and two equal documents are never on both sides.
"""

import hashlib

TEST = 0.1  # share of a set without a test part of its own


def hash64(data: bytes) -> int:
  """64 bits of BLAKE2b; the same everywhere and for ever."""
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "little")


def part(data: bytes, *, validation: float, test: float) -> str:
  """'train', 'validation' or 'test', in these expected shares of all.

  Raising `validation` moves records from train to validation only: the test
  part stays what it was.
  """
  u = hash64(data) / 2**64
  if u < test:
    return "test"
  return "validation" if u < test + validation else "train"


def check_fraction(fraction: float, field: str) -> float:
  """`fraction` if it lies in (0, 1); a ValueError naming `field` if not."""
  if not 0 < fraction < 1:
    raise ValueError(
      f"{field}={fraction!r} is the share of records held out of training, "
      "more than 0 and less than 1, e.g. 0.1."
    )
  return fraction
