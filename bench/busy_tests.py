"""make test beside two busy processes: python bench/busy_tests.py [--runs 3] [--hogs 2] [--json]

The whole of it: lint, site, notebooks and tests. Every run has to be green. One takes about 40 minutes on two
cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[1]


def run_tests():
    "Exit code, seconds and pytest's last line of one `make test`; where it is red, the end of what it said."
    start = perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        code = subprocess.run(["make", "test"], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT).returncode
        said.seek(0)
        text = said.read()
    if code:
        print(text[-5000:], file=sys.stderr)
    summary = re.findall(r"\d+ passed[^=\n]*", text)
    return {
        "exit": code,
        "seconds": round(perf_counter() - start),
        "pytest": summary[-1].strip() if summary else "",
    }


def measure(runs, hogs):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
    try:
        found = [run_tests() for _ in range(runs)]
    finally:
        for process in busy:
            process.kill()
    return {"cores": os.cpu_count(), "busy processes": hogs, "runs": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hogs", type=int, default=2, help="busy processes beside the tests")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, as results/busy_tests.json keeps it"
    )
    args = parser.parse_args()
    found = measure(args.runs, args.hogs)
    print(json.dumps(found, indent=1) if args.json else "\n".join(map(str, found["runs"])))
