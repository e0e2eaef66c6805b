"The `clip475` command, also reached by `python -m clip475`."
import sys


def main(argv=None):
    "Run the command line; packages that do not import get one sentence instead of a traceback."
    try: from clip475.cli import main as run
    except (ImportError, RuntimeError, OSError) as problem:
        print("clip475: " + _explain(problem), file=sys.stderr)
        return 2
    return run(argv)


def _explain(problem):
    from clip475.core import LabError, check_torch
    try: check_torch()
    except LabError as pair: return str(pair)
    return "the installation is not complete (%s); install it again: pip install -c constraints.txt -e ." % problem


if __name__ == "__main__": sys.exit(main())
