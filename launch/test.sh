#!/usr/bin/env bash
# Installs the package with what its tests need, and runs them.
#   ./launch/test.sh                            the default suite
#   ./launch/test.sh -m full                    full-size compiles, long runs
#   PYTHON=python3.13 ./launch/test.sh -m core  under another Python
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
use_environment test
# Two processes and no more than four: each simulates eight devices.
exec python -m pytest -n auto --maxprocesses=4 --dist loadfile "$@"
