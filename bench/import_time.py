"""How long `import clip475` takes: python bench/import_time.py

Starts fresh interpreters with and without the import and prints the best of several, in milliseconds.
"""

import subprocess
import sys
import time


def best_of(code, tries=7):
    "The shortest time in ms that a fresh interpreter needs to run `code`."

    def once():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return 1e3 * (time.perf_counter() - start)

    return min(once() for _ in range(tries))


if __name__ == "__main__":
    nothing = best_of("pass")
    for module in ("clip475", "clip475.core.config", "clip475.core.figures"):
        print(
            f"import {module:14} {best_of(f'import {module}') - nothing:7.1f} ms beyond a bare interpreter "
            f"({nothing:.0f} ms)"
        )
