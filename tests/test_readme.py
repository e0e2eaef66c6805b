"README.md is written from nbs/index.ipynb, and says so when it is stale."

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool():
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_fresh():
    text, figures = tool().render()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "README.md is stale: run `make readme`"
    for name, data in figures.items():
        assert (ROOT / "docs" / "readme" / name).read_bytes() == data, (
            f"docs/readme/{name} is stale: run `make readme`"
        )


def test_rendering_twice_gives_the_same():
    assert tool().render() == tool().render()


def test_no_line_for_nbdev_is_left():
    text, _ = tool().render()
    assert not [line for line in text.splitlines() if line.startswith("#|")]


def test_links_are_seen_from_the_root():
    relink = tool().relink
    assert (
        relink("[a](index.ipynb) [b](../CONTRIBUTING.md#x) [c](https://example.org/a)", ROOT / "nbs")
        == "[a](nbs/index.ipynb) [b](CONTRIBUTING.md#x) [c](https://example.org/a)"
    )


def test_every_relative_link_leads_somewhere():
    import re

    text, figures = tool().render()
    for target in re.findall(r'(?:\]\(|src="|href=")([^)"#\s]+)', text):
        if "://" not in target:
            assert (ROOT / target).exists() or Path(target).name in figures, (
                f"README.md links to {target}, which is not there"
            )


def test_the_table_of_lessons_is_that_of_the_lessons():
    import re

    import nbformat

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lessons = sorted((ROOT / "nbs" / "course" / "solutions").glob("[0-9]*.ipynb"))
    assert len(lessons) == 13
    for path in lessons:
        top = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells[:3])
        title = re.search(r"^# (.+)$", top, re.MULTILINE).group(1)
        minutes = " + ".join(re.findall(r"\*\* (\d+) minutes", top))
        row = next(
            (line for line in text.splitlines() if f"(nbs/course/{path.name})" in line and "| [" in line), ""
        )
        assert f"[{title}]" in row and f"| {minutes} |" in row, (
            f"README.md: the row of {path.stem} is stale: run nbs/index.ipynb, then `make readme`"
        )


def test_the_table_of_the_library_names_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "nbs" / "lib").glob("*/[0-9]*.ipynb"):
        assert f"({path.relative_to(ROOT).as_posix()})" in text, "run nbs/index.ipynb, then `make readme`"
