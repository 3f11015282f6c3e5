#!/usr/bin/env bash
# Make or reuse the environment and run the test suite.
#   bash test.sh [--fast] [pytest arguments]     --fast leaves out the tests marked slow
# Two workers share the files, as two cores allow; -n 0 runs in this process (for --pdb, or to read what is printed).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh

ensure_environment test
SELECTION=()
if [[ ${1:-} == --fast ]]; then
    shift
    SELECTION=(-m "not slow")
fi
exec "$PYTHON" -m pytest -n 2 --dist loadfile "${SELECTION[@]}" "$@"
