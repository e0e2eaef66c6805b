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
