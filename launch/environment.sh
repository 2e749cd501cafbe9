# Sourced by the scripts beside it: an environment with the package installed.
#
#   use_environment [extra ...]
#
# PYTHON=python3.13 chooses another Python, and an environment of its own.
# Installs only when something that decides the installation has changed.

use_environment() {
  local extras="$*" python="${PYTHON:-python3}" folder=.venv version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "No Python: '$python' does not run. Set PYTHON=/path/to/python3.11 or newer." >&2
    return 1
  }
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; $python is $version. Set PYTHON=/path/to/python3.11." >&2
    return 1
  fi
  if [ -n "${PYTHON:-}" ]; then folder=.venv-py$version; fi
  # The two ends that are tested: see constraints/.
  local constraints=constraints/newest.txt
  if [ "$version" = 3.11 ]; then constraints=constraints/oldest.txt; fi
  local wanted stamp
  wanted=$(cat pyproject.toml "$constraints" launch/environment.sh | cksum)
  stamp=$folder/.installed${extras:+-${extras// /-}}
  if [ ! -x "$folder/bin/python" ]; then
    echo "Making $folder with Python $version ..." >&2
    "$python" -m venv "$folder"
  fi
  if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Installing distrain-jax into $folder ..." >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$constraints" -e ".${extras:+[${extras// /,}]}"
    echo "$wanted" >"$stamp"
  fi
  PATH=$PWD/$folder/bin:$PATH
}
