"The `clip475` command, also reached by `python -m clip475`."

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line; packages that do not import get one sentence instead of a traceback."
    try:
        from clip475.app.cli import main as run
    except (ImportError, RuntimeError, OSError) as problem:
        print("clip475: " + _explain(problem), file=sys.stderr)
        return 2
    return run(argv)


def _explain(problem: Exception) -> str:
    from clip475.core.devices import _check_torch
    from clip475.core.files import LabError

    try:
        _check_torch()
    except LabError as pair:
        return str(pair)
    again = "install it again: pip install -c constraints.txt -e ."
    return f"the installation is not complete ({problem}); {again}"


if __name__ == "__main__":
    sys.exit(main())
