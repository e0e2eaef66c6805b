"""The students' notebooks of the course, made from the notebooks with solutions by nbgrader's own steps.

    python tools/course.py                     writes nbs/course/*.ipynb
    python tools/course.py --instructor DIR    writes a course folder for nbgrader: then, inside of DIR,
                                               nbgrader generate_assignment 07_measuring
                                               nbgrader autograde 07_measuring

In nbs/course/solutions a cell is
- an exercise, if it has a region between ### BEGIN SOLUTION and ### END SOLUTION;
- the check of an exercise, if it is the one line `name = check(name)`;
- an answer in words, if it is Markdown that begins with <!-- ANSWER -->;
- for instructors only, if it begins with <!-- SOLUTION --> (Markdown) or ### SOLUTION ONLY (code).
The points of an exercise are the stars on its card. nbgrader reads all of this from metadata, which this
program adds, so the sources stay plain.
"""

import argparse
import os
import re
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "nbs" / "course"
SOLUTIONS = COURSE / "solutions"

CODE_STUB = "# Write your code here.\nraise NotImplementedError"
TEXT_STUB = "*Write your answer here.*"

CHECK_CELL = re.compile(r"^(\w+) = check\((\w+)\)$")
CARD = re.compile(r"^### Exercise [\d.]+:.*\((★+)", re.M)
HIDDEN_TEST = """

### BEGIN HIDDEN TESTS
from clip475.app import checks

assert checks.passed("{name}")
### END HIDDEN TESTS"""


def has_nbgrader() -> bool:
    return find_spec("nbgrader") is not None


def lessons() -> list[Path]:
    "The notebooks with solutions, in the order of the course."
    return sorted(SOLUTIONS.glob("[0-9]*.ipynb"))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(notebook), encoding="utf-8")


def as_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


# ---- links, from one folder to the one above


def relink(text: str, is_code: bool) -> str:
    "`text` of a cell in solutions/, with relative paths as they are from nbs/course."
    if is_code:
        return re.sub(r"(?<=[\"'])\.\./[^\"'\s]+(?=[\"'])", lambda m: _path_from_course(m[0]), text)
    text = re.sub(r"(?<=\]\()[^)\s]+(?=[)\s])", lambda m: _link_from_course(m[0]), text)
    return re.sub(r"((?:href|src)=\")([^\"]+)(?=\")", lambda m: m[1] + _link_from_course(m[2]), text)


def _path_from_course(path: str) -> str:
    "A path written in code: only what exists is taken for a path."
    return os.path.relpath(SOLUTIONS / path, COURSE) if (SOLUTIONS / path).exists() else path


def _link_from_course(link: str) -> str:
    path, mark, place = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    target = os.path.normpath(SOLUTIONS / path)
    if Path(target).parent == SOLUTIONS:
        return link
    return Path(os.path.relpath(target, COURSE)).as_posix() + mark + place


# ---- what a cell is


def _is_for_instructors(cell: NotebookNode) -> bool:
    return cell.source.lstrip().startswith(("<!-- SOLUTION -->", "### SOLUTION ONLY"))


def _defined_name(source: str) -> str:
    "The function or class that an exercise cell defines."
    names = re.findall(r"^(?:def|class) (\w+)", source, re.M)
    return names[-1] if names else ""


def _grading(grade_id: str, *, solution: bool, points: int = 0) -> dict:
    "nbgrader's metadata: a check has points, an exercise is a solution, an answer in words is both."
    facts = {"grade": points > 0, "grade_id": grade_id, "locked": not solution, "schema_version": 3}
    return facts | {"solution": solution, "task": False} | ({"points": points} if points else {})


def _complaint(path: Path, number: int, problem: str) -> ValueError:
    return ValueError(f"{path.name}, cell {number}: {problem}")


# ---- the notebook as an instructor needs it, and as a student gets it


def for_instructors(path: Path) -> NotebookNode:
    "A lesson with solutions and nbgrader's metadata: what `nbgrader generate_assignment` starts from."
    notebook = read(path)
    notebook.cells = [deepcopy(cell) for cell in notebook.cells if not _is_for_instructors(cell)]
    stars, answers = 1, 0
    for number, cell in enumerate(notebook.cells):
        is_code = cell.cell_type == "code"
        cell.source = relink(cell.source, is_code)
        card = CARD.search(cell.source)
        stars = len(card[1]) if card and not is_code else stars
        if not is_code and cell.source.startswith("<!-- ANSWER -->"):
            answers += 1
            cell.metadata["nbgrader"] = _grading(f"answer-{answers}", solution=True, points=stars)
        elif is_code and "### BEGIN SOLUTION" in cell.source:
            name = _defined_name(cell.source)
            if not name:
                raise _complaint(path, number, "an exercise defines a function or a class")
            cell.metadata["nbgrader"] = _grading(f"write-{name}", solution=True)
        elif is_code and re.search(r"\bcheck\(", cell.source) and "import" not in cell.source:
            check = CHECK_CELL.match(cell.source.strip())
            if not check or check[1] != check[2]:
                raise _complaint(path, number, "a check stands alone in its cell, as in: name = check(name)")
            cell.metadata["nbgrader"] = _grading(f"check-{check[1]}", solution=False, points=stars)
            cell.source = cell.source.strip() + HIDDEN_TEST.format(name=check[1])
    return notebook


def for_students(path: Path) -> NotebookNode:
    "A lesson without solutions, outputs and hidden tests: the result of `nbgrader generate_assignment`."
    from nbgrader import preprocessors as steps

    clear = steps.ClearSolutions(code_stub={"python": CODE_STUB}, text_stub=TEXT_STUB)
    notebook = for_instructors(path)
    order = [
        steps.LockCells(),
        clear,
        steps.ClearOutput(),
        steps.CheckCellMetadata(),
        steps.ClearHiddenTests(),
        steps.ComputeChecksums(),
    ]
    for step in order:
        notebook, _ = step.preprocess(notebook, {})
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
    return notebook


# ---- how long a lesson is


def reading_minutes(notebook: NotebookNode) -> float:
    "200 words or 15 lines of code a minute; blank lines and comments do not count."
    words = lines = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            words += len(re.findall(r"\w+", cell.source))
        elif cell.cell_type == "code":
            lines += sum(bool(s.strip()) and not s.strip().startswith("#") for s in cell.source.splitlines())
    return words / 200 + lines / 15


# ---- both commands

NBGRADER_CONFIG = f""""How nbgrader makes and grades the lessons of clip475."
c = get_config()
c.CourseDirectory.course_id = "clip475"
c.ClearSolutions.code_stub = {{"python": {CODE_STUB!r}}}
c.ClearSolutions.text_stub = {TEXT_STUB!r}
c.Execute.timeout = 600
"""


def write_students() -> list[str]:
    "Write nbs/course/*.ipynb, remove notebooks that have no source, and return the names of what changed."
    changed = []
    for path in lessons():
        target, text = COURSE / path.name, as_text(for_students(path))
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
            changed.append(path.name)
    for orphan in {p.name for p in COURSE.glob("*.ipynb")} - {p.name for p in lessons()}:
        (COURSE / orphan).unlink()
        changed.append(orphan)
    return sorted(changed)


def write_instructor(folder: Path) -> None:
    "Write a course folder for nbgrader: its configuration, and one assignment for each lesson."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nbgrader_config.py").write_text(NBGRADER_CONFIG, encoding="utf-8")
    for path in lessons():
        write(for_instructors(path), folder / "source" / path.stem / path.name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make the notebooks of the course.")
    parser.add_argument("--instructor", metavar="DIR", type=Path, help="write a course folder for nbgrader")
    options = parser.parse_args(arguments)
    if options.instructor:
        write_instructor(options.instructor)
        print(f"{options.instructor}: {len(lessons())} lessons for nbgrader")
        return 0
    changed = write_students()
    print(f"nbs/course: {len(lessons())} lessons; changed: {', '.join(changed) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
