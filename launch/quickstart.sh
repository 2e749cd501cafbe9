#!/usr/bin/env bash
# Installs the package into .venv and trains every method on the digits.
# PYTHON=python3.13 ./launch/quickstart.sh [flags of launch/quickstart.py]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
use_environment
exec python launch/quickstart.py "$@"
