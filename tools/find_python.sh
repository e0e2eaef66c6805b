#!/bin/sh
# Prints the path of a Python that is new enough, runs, and can make a virtual environment.
# With an argument only that one is tried; without, python3 first and then its newer siblings.
# (A name on the PATH is no proof: version managers leave stand-ins that fail when called.)
works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

for python in ${1:-python3 python3.13 python3.12 python3.11 python}; do
    works "$python" || continue
    if "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then command -v "$python"; exit 0; fi
    bare=$python
done

if [ -n "$bare" ]; then
    echo "clip475: $bare cannot make a virtual environment; add its venv module (on Debian and Ubuntu: sudo apt install python3-venv) and try again." >&2
else
    found=$("${1:-python3}" -c 'import sys; print("is Python %d.%d" % sys.version_info[:2])' 2>/dev/null) || found="does not run"
    echo "clip475 needs Python 3.11 or newer, and ${1:-python3} $found: install a newer one, or name it, as in: make demo PYTHON=/path/to/python3.12" >&2
fi
exit 1
