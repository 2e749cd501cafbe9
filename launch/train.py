r"""Trains what a config says.

  python launch/train.py --config=configs/digits.py --workdir=runs/digits
  python launch/train.py --config=configs/digits.py --workdir=runs/zero1 \
    --devices=8 --config.method.name=zero1 --config.steps=500

One GPU or TPU stands for eight with --config.simulate=8.

Run again with the same workdir, it goes on from the latest checkpoint. Leaves
with 75 when SIGTERM or SIGINT stopped it and its state is saved.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from distrain_jax import spmd
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
DEVICES = flags.DEFINE_integer(
  "devices", None, "Simulate so many CPU devices; unset: what is there."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of several processes that the cluster started."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # libraries tell of every file
  if DEVICES.value is not None:
    spmd.use_cpu_devices(DEVICES.value)
  spmd.join_processes(auto=DISTRIBUTED.value)
  import jax

  from distrain_jax import train

  try:
    result = train.train(train.build(CONFIG.value), WORKDIR.value)
  except train.Interrupted:
    sys.exit(train.EXIT_CODE)
  except (ValueError, FileNotFoundError, ImportError, train.BadStep) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  if jax.process_index() == 0:
    for name, value in result.metrics.items():
      print(f"{name} {value:.5g}")
    print(f"curves: {WORKDIR.value}/curves.png")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
