#!/bin/sh
# Prints the path of a Python 3.12 or newer; the newest JAX needs one.
set -u
candidates="${PYTHON_NEWEST:-} python3.14 python3.13 python3.12 python3"
if command -v pyenv > /dev/null 2>&1; then
    candidates="$candidates $(ls -d "$(pyenv root)"/versions/3.1[2-9]*/bin/python3 2> /dev/null | sort -r)"
fi
for python in $candidates; do
    # a version manager's shim may exist and yet run nothing, so ask it
    path=$("$python" -c 'import sys, venv; print(sys.executable if sys.version_info >= (3, 12) else "")' 2> /dev/null)
    if [ -n "$path" ]; then
        echo "$path"
        exit 0
    fi
done
echo "No Python 3.12 or newer was found; install one, or name it: make test-newest PYTHON_NEWEST=/path/to/python3" >&2
exit 1
