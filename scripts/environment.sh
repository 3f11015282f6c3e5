# shellcheck shell=bash
# The Python environment of quickstart.sh, test.sh and .ci/run. Sourced; the caller has changed to the repository root.
#
#   VENV             where the environment is or will be (default: .venv)
#   BASE_PYTHON      the Python 3.11 or 3.12 it is made from (default: the first one found)
#   TORCH_INDEX_URL  index to take torch from, e.g. https://download.pytorch.org/whl/cpu without an accelerator

VENV=${VENV:-$PWD/.venv}

find_base_python() {
    local candidate
    for candidate in ${BASE_PYTHON:+"$BASE_PYTHON"} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: python: neither 3.11 nor 3.12 was found; try: BASE_PYTHON=/path/to/python3.11" >&2
    return 1
}

# Hash of everything that decides what is installed.
environment_hash() {
    local base
    base=$(find_base_python)
    "$base" - setup.py constraints.txt "${TORCH_INDEX_URL:-}" <<'PYTHON'
import hashlib, pathlib, sys
setup, constraints, index = sys.argv[1:]
what = pathlib.Path(setup).read_bytes() + pathlib.Path(constraints).read_bytes() + (index + sys.version).encode()
print(hashlib.sha256(what).hexdigest()[:12])
PYTHON
}

# ensure_environment [EXTRA]: make or reuse $VENV with the library's dependencies (and those of an extra).
# Afterwards PYTHON is its interpreter and this working copy is what gets imported.
ensure_environment() {
    local extra=${1:-} stamp
    stamp=$VENV/installed-$(environment_hash)${extra:+-$extra}
    export PYTHON=$VENV/bin/python
    # First on the path: an environment that several working copies share imports the one it is used from.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    if [[ -f $stamp ]]; then return; fi
    if [[ ! -x $PYTHON ]]; then make_venv; fi
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        install_packages --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' constraints.txt)"
    fi
    install_packages --constraint constraints.txt --editable ".${extra:+[$extra]}"
    touch "$stamp"
}

make_venv() {
    local base
    base=$(find_base_python)
    echo "making $VENV with $("$base" --version)"
    # Debian's python3 comes without ensurepip: there the system's pip fills the environment.
    "$base" -m venv "$VENV" 2>/dev/null || {
        "$base" -m venv --clear --without-pip "$VENV"
        "$base" -m pip --python "$PYTHON" install --quiet pip
    }
}

install_packages() {
    local log=$VENV/install.log
    echo "installing packages (some minutes the first time; log: $log)"
    "$PYTHON" -m pip install --progress-bar off "$@" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        echo "error: pip: installing into $VENV failed; the whole log: $log" >&2
        return 1
    }
}
