#!/bin/sh
# environment.sh VENV PYTHON: makes the environment VENV with PYTHON unless it is there.
set -eu
if [ ! -x "$1/bin/python" ]; then
    [ -n "$2" ] || exit 1 # find_python.sh said what is missing
    "$2" -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "PYTHON=$2 must be a Python from 3.10 on" >&2; exit 1; }
    "$2" -m venv "$1"
    touch "$1/made-for-lmf_kernels" # what make may bring to the pinned versions
fi
"$1/bin/python" -m pip --version >/dev/null 2>&1 || { echo "the environment $1 has no pip: $1/bin/python -m ensurepip" >&2; exit 1; }
