"""The command line of a launcher, with a config's own errors as one line."""

import re
import sys

from absl import app


def parse_flags(argv: list[str]) -> list[str]:
  """For `absl.app.run(main, flags_parser=...)`.

  Leaves with one line, not a traceback, where a field of --config does not
  exist, has another type, or its file cannot be read.
  """
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError) as e:
    text = str(e.args[0] if e.args else e).replace("\\n", " ")
    text = re.sub(r"[\\'\"\s]+", " ", text).strip()
    sys.exit(f"--config: unknown field or wrong type: {text}")
  except OSError as e:
    sys.exit(f"--config: {e}")
