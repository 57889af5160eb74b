#!/usr/bin/env bash
# Builds wheel and sdist, checks both, installs the wheel alone in a fresh environment, and runs the demo from there.
#   scripts/package.sh PYTHON [ROUNDS]      PYTHON: with build and twine; what was built lies in dist/
# It says what the core and each extra cost: the numbers of docs/install.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(realpath --no-symlinks "$1")"
rounds="${2:-30}"
rm -rf dist
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*
wheel="$(realpath dist/*.whl)"
alone="$(mktemp -d)"
trap 'rm -rf "$alone"' EXIT
"$python" -m venv "$alone/env"

# WHAT ARGUMENT...: installs, and says how long that took and how much the environment has grown.
bring() {
  local what="$1" began="$SECONDS" before after
  shift
  before="$(du -sm "$alone/env" | cut -f1)"
  "$alone/env/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt "$@"
  after="$(du -sm "$alone/env" | cut -f1)"
  echo "$what: $((after - before)) MB, $((SECONDS - began)) s"
}
bring torch torch
bring core "$wheel"
for extra in report demo data mesh privacy; do bring "$extra" "$wheel[$extra]"; done
cd "$alone" # nothing of the repository is in reach
env -u PYTHONPATH "$alone/env/bin/decaf" compare digits --seeds 0 --rounds "$rounds" --out demo
test -s demo/report.html
