import json
import os
import subprocess
import sys

import pytest

FORK = """
import json, os, runpy, sys
IMPORTS
codes = {}
for name, command in json.load(sys.stdin).items():
  child = os.fork()
  if not child:
    for stream, ending in ((1, "out"), (2, "err")):
      file = os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT)
      os.dup2(file, stream)
    sys.argv = command
    code = 0
    try:
      runpy.run_path(command[0], run_name="__main__")
    except SystemExit as e:
      code = e.code or 0
      if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="session")
def run_launchers():
  """run_launchers(commands, folder, imports) -> name -> (code, out, err).

  Every command {name: argv} runs in a process of its own, as if started from
  the folder, but forked from one that has the imports: they take seconds.
  """

  def run(commands, folder, imports):
    result = subprocess.run(
      [sys.executable, "-W", "ignore", "-c", FORK.replace("IMPORTS", imports)],
      input=json.dumps(commands),
      cwd=folder,
      env={**os.environ, "HOME": str(folder)},  # of the compilation cache
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    read = lambda name, ending: (folder / f"{name}.{ending}").read_text()
    return lambda name: (codes[name], read(name, "out"), read(name, "err"))

  return run
