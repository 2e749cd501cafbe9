r"""Starts one command as several processes of one run, on this machine.

  python launch/local.py --processes=2 --devices=4 -- \
    launch/train.py --config=configs/digits.py --workdir=runs/two

As on a cluster: the processes find each other (`spmd.join_processes` reads what
is set here) and speak over the network, on CPU through gloo. The output of each
goes to a file, process_I.log in --logs; that of process 0 is also shown. When
one dies all are ended, with one error. SIGTERM and SIGINT are passed on; the
exit code is that of the processes, such as 75 for interrupted and saved.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

INTERRUPTED = 75  # distrain_jax.train.EXIT_CODE, without importing JAX here
POLL = 0.02  # seconds between looks at the processes
LAST_LINES = 15  # of a dead process's log, in the error
# What is passed on: a closed terminal asks to save and stop, as SIGTERM does.
PASSED_ON = {
  signal.SIGTERM: signal.SIGTERM,
  signal.SIGINT: signal.SIGINT,
  signal.SIGHUP: signal.SIGTERM,
}
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Worker(NamedTuple):
  """One process; the leader of a group and session of its own."""

  process: subprocess.Popen
  log: Path
  start: int  # where in the log this run's output begins


def parser() -> argparse.ArgumentParser:
  """The flags; their help is the reference."""
  p = argparse.ArgumentParser(
    prog="local.py",
    usage="local.py [--processes=N] [--devices=N] [--logs=DIR] -- COMMAND ...",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument("--processes", type=int, default=2, help="how many; 2")
  p.add_argument(
    "--devices",
    type=int,
    help="CPU devices that each simulates: added to the command as --devices=N",
  )
  p.add_argument(
    "--logs", help="folder; unset: logs/ in the command's --workdir, or here"
  )
  p.add_argument("command", nargs="+", help="after --; FILE.py or a program")
  return p


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; its exit code, or that of the process that died."""
  p = parser()
  args = p.parse_args(argv)
  for flag in ("processes", "devices"):
    value = getattr(args, flag)
    if value is not None and value < 1:
      p.error(f"--{flag} is at least 1; got {value}")
  command = list(args.command)
  if command[0].endswith(".py"):
    if not Path(command[0]).is_file():
      p.error(f"{command[0]} is no file; the command stands after --")
    command.insert(0, sys.executable)
  if args.devices is not None:
    command.append(f"--devices={args.devices}")
  logs = Path(args.logs or _workdir(command) / "logs")
  logs.mkdir(parents=True, exist_ok=True)
  return run(command, args.processes, logs)


def run(command: Sequence[str], processes: int, logs: Path) -> int:
  """Starts them, waits, and leaves none behind however it ends."""
  asked: list[int] = []  # signals to pass on
  note = lambda number, frame: asked.append(number)
  before = {number: signal.signal(number, note) for number in PASSED_ON}
  workers: list[Worker] = []
  try:
    address = f"localhost:{_free_port()}"
    for i in range(processes):
      workers.append(start(command, i, processes, address, logs))
    return watch(workers, asked)
  finally:
    for worker in workers:
      _send(worker, signal.SIGKILL)
    for worker in workers:
      worker.process.wait()
    for number, handler in before.items():
      signal.signal(number, handler)


def start(
  command: Sequence[str], i: int, processes: int, address: str, logs: Path
) -> Worker:
  """Process i; its output goes to the end of its log."""
  log = logs / f"process_{i}.log"
  with log.open("ab") as file:
    where = file.tell()
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      preexec_fn=_die_with_parent(),
      env={
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
        "PYTHONUNBUFFERED": "1",
      },
    )
  return Worker(process, log, where)


def watch(workers: Sequence[Worker], asked: list[int]) -> int:
  """Shows process 0 and passes signals on, until all ended or one died."""
  with workers[0].log.open("rb") as shown:
    shown.seek(workers[0].start)
    while True:
      codes = [worker.process.poll() for worker in workers]
      sys.stdout.buffer.write(shown.read())
      sys.stdout.buffer.flush()
      while asked:
        number = PASSED_ON[asked.pop(0)]
        for worker in workers:
          _send(worker, number)
      died = [i for i, c in enumerate(codes) if c not in (None, 0, INTERRUPTED)]
      if died:
        # Others may have died of it in the same moment: a signal came first.
        first = min(died, key=lambda i: codes[i] >= 0)
        print(_error(workers, first), file=sys.stderr, flush=True)
        return codes[first] if codes[first] > 0 else 128 - codes[first]
      if None not in codes:
        return max(codes)
      time.sleep(POLL)


def _error(workers: Sequence[Worker], i: int) -> str:
  code, (_, log, start) = workers[i].process.returncode, workers[i]
  how = f"ended with exit code {code}"
  if code < 0:
    how = f"was ended by {signal.Signals(-code).name}"
  text = log.read_bytes()[start:].decode(errors="replace")
  lines = text.replace("\r", "\n").splitlines()[-LAST_LINES:]
  head = f"local.py: process {i} of {len(workers)} {how}, so all were ended."
  return "\n  ".join([f"{head} The end of {log}:", *lines])


def _send(worker: Worker, number: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(worker.process.pid, number)


def _die_with_parent():
  """For the child to call: SIGKILL if this process is itself killed so."""
  if sys.platform != "linux":
    return None
  prctl = ctypes.CDLL(None).prctl
  return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def _workdir(command: Sequence[str]) -> Path:
  """The command's --workdir, or the current folder."""
  for word, following in zip(command, [*command[1:], ""]):
    flag, _, value = word.partition("=")
    if flag in ("--workdir", "-workdir"):
      return Path(value or following)
  return Path()


if __name__ == "__main__":
  sys.exit(main())
