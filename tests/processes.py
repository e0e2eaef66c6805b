"A process for a test: its return code comes first, and what it wrote to stderr is shown where that is wrong."

import subprocess


def finished(command, code=0, **options):
    "The finished process, with its output as text; fails with what it wrote unless it returns `code`."
    done = subprocess.run(command, capture_output=True, text=True, **options)
    check_code(done.returncode, code, done.stdout, done.stderr)
    return done


def check_code(found, expected, stdout, stderr):
    said = f"stdout ends:\n{(stdout or '')[-1000:]}\nstderr ends:\n{(stderr or '')[-3000:]}"
    assert found == expected, f"the process returned {found}, not {expected}\n{said}"
