"The students' notebooks: made from the ones with solutions, complete, with true minutes, and gradable."

import os
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest
from processes import finished

ROOT = Path(__file__).resolve().parent.parent


def load_tool():
    spec = spec_from_file_location("course_tool", ROOT / "tools" / "course.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()
LESSONS = tool.lessons()
NEEDS_NBGRADER = pytest.mark.skipif(
    not tool.has_nbgrader(), reason="nbgrader is not installed: pip install 'clip475[instructors]'"
)
MINUTES = re.compile(
    r"^\*\*Reading and running:\*\* (\d+) minutes · \*\*Exercises:\*\* (\d+) minutes · \*\*Needs:\*\* .+$",
    re.M,
)


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return request.param


def both(lesson):
    return [path for path in (lesson, tool.COURSE / lesson.name) if path.is_file()]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# ---- the students' notebooks


@NEEDS_NBGRADER
def test_students_notebook_is_current(lesson):
    path = tool.COURSE / lesson.name
    assert path.is_file(), f"nbs/course/{lesson.name} is missing: run make course"
    current = tool.as_text(tool.for_students(lesson))
    assert path.read_text(encoding="utf-8") == current, f"nbs/course/{lesson.name} is old: run make course"


def test_no_students_notebook_without_a_source():
    names = {path.name for path in LESSONS}
    assert not [path.name for path in tool.COURSE.glob("*.ipynb") if path.name not in names]


def test_students_notebook_holds_no_solution(lesson):
    notebook = tool.read(tool.COURSE / lesson.name)
    for cell in notebook.cells:
        assert not re.search(
            r"(BEGIN|END) (SOLUTION|HIDDEN)|SOLUTION ONLY|<!-- (SOLUTION|ANSWER) -->", cell.source
        )
        assert not cell.get("outputs")
    answers = [cell for cell in tool.read(lesson).cells if cell.source.startswith("<!-- ANSWER -->")]
    assert sum(cell.source == tool.TEXT_STUB for cell in notebook.cells) == len(answers)


def test_each_exercise_has_its_check(lesson):
    notebook = tool.for_instructors(lesson)
    ids = [cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len(set(ids)) == len(ids)
    written = {name.removeprefix("write-") for name in ids if name.startswith("write-")}
    checked = {name.removeprefix("check-") for name in ids if name.startswith("check-")}
    assert checked <= written
    assert checked or not written or lesson.stem[:2] in ("11", "12", "13")


# ---- links and minutes


def test_links_resolve(lesson):
    for path in both(lesson):
        for link in re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", prose(tool.read(path))):
            target = (link[0] or link[1]).partition("#")[0]
            if target and not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_badge_opens_the_students_notebook(lesson):
    assert f"github/clip475/clip475/blob/main/nbs/course/{lesson.name})" in prose(tool.read(lesson))


def test_stated_minutes_are_within_a_fifth_of_the_count(lesson):
    notebook = tool.read(lesson)
    stated = MINUTES.search(prose(notebook))
    wanted = "**Reading and running:** 24 minutes · **Exercises:** …"
    assert stated, f"{lesson.name} has no line like: {wanted}"
    counted = tool.reading_minutes(notebook)
    assert abs(int(stated[1]) - counted) <= counted / 5, (
        f"{lesson.name}: {stated[1]} stated, {counted:.1f} counted"
    )
    assert int(stated[1]) <= 30
    assert counted <= 30.5


def test_lessons_one_to_nine_take_five_hours_at_most():
    assert sum(tool.reading_minutes(tool.read(path)) for path in LESSONS if path.stem < "10") <= 300


# ---- the generator itself, on a small lesson

SMALL = [
    (
        "markdown",
        '# Small\n\n[library](../../lib/x/01_y.ipynb) [next](02_next.ipynb#a) <img src="../../../p.png">',
    ),
    ("code", 'path = "../../../settings.ini"\nother = "../nothing/there"'),
    ("markdown", "### Exercise 1.1: Twice (★★, 5 minutes)\nWrite it."),
    (
        "code",
        "def twice(x):\n    'Two times.'\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION",
    ),
    ("code", "twice = check(twice)"),
    ("markdown", "<!-- SOLUTION -->\nBecause."),
    ("code", "### SOLUTION ONLY\nsecret = 1"),
    ("markdown", "<!-- ANSWER -->\nA model answer."),
]


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "COURSE", ROOT / "nbs" / "course")
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(cells=[make[kind](source) for kind, source in SMALL])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    tool.write(notebook, tmp_path / "01_small.ipynb")
    return tmp_path / "01_small.ipynb"


@NEEDS_NBGRADER
def test_small_lesson_for_students(small):
    title, paths, card, exercise, check, answer = tool.for_students(small).cells
    assert "](../lib/x/01_y.ipynb)" in title.source
    assert "](02_next.ipynb#a)" in title.source
    assert 'src="../../p.png"' in title.source
    assert paths.source == 'path = "../../settings.ini"\nother = "../nothing/there"'
    stub = "def twice(x):\n    'Two times.'\n    # Write your code here.\n    raise NotImplementedError"
    assert exercise.source == stub
    assert check.source == "twice = check(twice)"
    assert check.metadata.nbgrader.points == 2
    assert answer.source == tool.TEXT_STUB


def test_small_lesson_for_instructors(small):
    cells = tool.for_instructors(small).cells
    assert 'assert checks.passed("twice")' in cells[4].source
    assert "secret" not in "".join(cell.source for cell in cells)


@pytest.mark.parametrize(
    "source", ["twice = check(thrice)", "check(twice)", "twice = check(twice)\ntwice(3)"]
)
def test_a_check_stands_alone(small, source):
    notebook = tool.read(small)
    notebook.cells[4].source = source
    tool.write(notebook, small)
    with pytest.raises(ValueError, match="01_small.ipynb, cell 4: a check stands alone"):
        tool.for_instructors(small)


# ---- nbgrader itself: a right, a wrong and an empty hand-in


def gradable(path):
    "Exercises of a lesson that a check grades."
    cells = tool.for_instructors(path).cells
    return [c for c in cells if c.metadata.get("nbgrader", {}).get("grade_id", "").startswith("check-")]


def shorten(path):
    "Keep what the points depend on: imports and exercises with their checks. Other tests run whole lessons."
    notebook = tool.read(path)
    imports = r"^(import|from) \w+"
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "nbgrader" in cell.metadata or (cell.cell_type == "code" and re.search(imports, cell.source, re.M))
    ]
    tool.write(notebook, path)


def hand_in(course, student, lesson, sources):
    "Hand in the released notebook with the cells `sources` {grade_id: code} filled in."
    notebook = tool.read(course / "release" / lesson.stem / lesson.name)
    for cell in notebook.cells:
        cell.source = sources.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    tool.write(notebook, course / "submitted" / student / lesson.stem / lesson.name)


def nbgrader(course, *arguments):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # nbgrader calls alembic
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "PATH": path,
    }
    command = [sys.executable, "-m", "nbgrader", *arguments]
    finished(command, cwd=course, env=environment)


def auto_scores(course, lesson):
    "Points that nbgrader gave by itself, and the highest possible, for each student."
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        scores = {}
        for submission in book.assignment_submissions(lesson.stem):
            grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
            checks = [grade for grade in grades if grade.name.startswith("check-")]
            scores[submission.student.id] = (
                sum(g.auto_score or 0 for g in checks),
                sum(g.max_score for g in checks),
            )
        return scores


@NEEDS_NBGRADER
@pytest.mark.skipif(not LESSONS, reason="there is no lesson yet")
def test_nbgrader_grades_a_right_a_wrong_and_an_empty_hand_in(tmp_path):
    lesson = next((path for path in LESSONS if len(gradable(path)) >= 2), LESSONS[0])
    tool.write_instructor(tmp_path)
    shorten(tmp_path / "source" / lesson.stem / lesson.name)
    nbgrader(tmp_path, "generate_assignment", lesson.stem, "--create", "--force")
    released = tool.read(tmp_path / "release" / lesson.stem / lesson.name)
    generated = [cell.source for cell in tool.for_students(lesson).cells]
    assert {cell.source.rstrip() for cell in released.cells} <= set(generated)

    solved = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in tool.for_instructors(lesson).cells
        if cell.metadata.get("nbgrader", {}).get("grade_id", "").startswith("write-")
    }
    last = list(solved)[-1]
    name = last.removeprefix("write-")
    wrong = solved | {last: f"def {name}(*args, **kwargs):\n    return 'wrong'"}
    for student, sources in {"right": solved, "wrong": wrong, "empty": {}}.items():
        hand_in(tmp_path, student, lesson, sources)
    nbgrader(tmp_path, "autograde", lesson.stem, "--create")

    scores = auto_scores(tmp_path, lesson)
    full = scores["right"][1]
    assert full > 0
    assert scores["right"] == (full, full)
    assert 0 < scores["wrong"][0] < full
    assert scores["empty"] == (0, full)
