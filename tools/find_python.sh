#!/bin/sh
# Prints a Python that can make environments: of the version given ("3.12"), else the newest on PATH that is tested, else
# python3 from 3.10 on. Without one, a line that says what is missing, and status 1.
usable() {
    "$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))" 2>/dev/null && echo "$1"
}
for version in ${1:-3.13 3.12 3.11 3.10}; do
    usable "python$version" && exit
done
if [ $# -eq 0 ]; then
    usable python3 && exit
    echo "no python3 from 3.10 on with the modules venv and ensurepip was found: install one, or name it (PYTHON=...)" >&2
else
    for python in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do usable "$python" && exit; done
    echo "Python $1 was not found: install it, on PATH or by pyenv" >&2
fi
exit 1
