#!/usr/bin/env bash
# Builds wheel and sdist, checks both, installs the wheel alone in a fresh environment, and runs the demo from there.
#   scripts/package.sh PYTHON [ROUNDS]      PYTHON: with build and twine; what was built lies in dist/
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath --no-symlinks "$1")"
rounds="${2:-30}"
rm -rf dist
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*
alone="$(mktemp -d)"
trap 'rm -rf "$alone"' EXIT
"$python" -m venv "$alone/env"
pip=("$alone/env/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt)
"${pip[@]}" torch
"${pip[@]}" dist/*.whl
cd "$alone" # nothing of the repository is in reach
env -u PYTHONPATH "$alone/env/bin/decaf" compare digits --seeds 0 --rounds "$rounds" --out demo
test -s demo/report.html
