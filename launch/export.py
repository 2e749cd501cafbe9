r"""The model of a run's checkpoint, as a file that any run can start from.

  python launch/export.py runs/sdp data/sdp.safetensors
  python launch/train.py --config=configs/sdp/text.py --workdir=runs/quarter \
    --devices=8 --config.method.coverage=0.25 \
    --config.initial_params=data/sdp.safetensors

The file holds the model that is evaluated, in plain arrays: so any method, any
number of workers and any subnetworks can go on from it, with a new optimizer
and data order. Statistics such as BatchNorm's are not in it; what SDP's
rescale="test" scales is in it as it is evaluated. Works on simulated CPU
devices, as many as the run had; no data is needed.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
  """The flags; their help is the reference."""
  p = argparse.ArgumentParser(
    prog="export.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("run", metavar="RUN", help="the run's folder (--workdir)")
  p.add_argument("out", metavar="FILE", help="to make, *.safetensors")
  p.add_argument("--step", type=int, help="of the checkpoint; unset: latest")
  p.add_argument(
    "--devices",
    type=int,
    help="simulate so many; unset: as many as the run had. Fewer need less "
    "memory, if the method can change its number of workers",
  )
  p.add_argument("--overwrite", action="store_true", help="replace FILE")
  return p


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; 2 and a message on bad input."""
  args = parser().parse_args(argv)
  from absl import logging

  from distrain_jax import spmd
  from distrain_jax.train import export

  logging.set_verbosity(logging.WARNING)  # libraries tell of every file
  try:
    if pathlib.Path(args.out).exists() and not args.overwrite:
      raise FileExistsError(
        f"{args.out} exists. Pass --overwrite to replace it."
      )
    spmd.use_cpu_devices(args.devices or export.devices(args.run, args.step))
    made = export.export(args.run, args.out, step=args.step)
  except (ValueError, OSError) as e:
    print(f"export.py: {e}", file=sys.stderr)
    return 2
  print(f"{args.out}: {made.model['name']} of step {made.step}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
