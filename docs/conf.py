"""The documentation site: `make docs` reads the notebooks where they stand, and the docstrings.

Nothing is executed: a page shows the outputs that its notebook keeps. Sphinx's source folder is the
repository, so that a link between notebooks and pages is the same here and on GitHub. A dead one stops it.
"""

import json
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="agg")

import clip475  # noqa: E402

_ini = ConfigParser(delimiters=["="], interpolation=None)
_ini.read(ROOT / "settings.ini", encoding="utf-8")
_settings = _ini["DEFAULT"]

project, author = _settings["title"], _settings["author"]
release = version = _settings["version"]
project_copyright = _settings["copyright"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "nbs/**", "results/README.md"]
exclude_patterns = [
    "docs/_*",
    "nbs/index.ipynb",
    "**/.ipynb_checkpoints",
]  # the README is made from the index
templates_path = [str(ROOT / "docs" / "_templates")]  # autosummary looks in the source folder

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "literal"  # docstrings write `names` as Markdown does
maximum_signature_line_length = 90

html_theme = "furo"
html_title = _settings["title"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_readme.html"}
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "source_repository": _settings["git_url"],
    "source_branch": _settings["branch"],
    "source_directory": "",
}


def _contents() -> str:
    "The tables of contents: lessons, library notebooks in the order of their packages, pages of the project."
    library = ["docs/api", *(f"nbs/lib/{package}/*" for package in clip475._PACKAGES)]
    project_pages = ["docs/instructors", "results/README", "CONTRIBUTING", "CHANGELOG", "SECURITY"]
    parts = {
        "The course": ["nbs/course/*"],
        "The course with solutions": ["nbs/course/solutions/*"],
        "The library": library,
        "The project": project_pages,
    }
    trees = (
        "\n".join(
            ["```{toctree}", ":hidden:", ":titlesonly:", f":caption: {caption}", ":glob:", "", *pages, "```"]
        )
        for caption, pages in parts.items()
    )
    return "\n\n" + "\n\n".join(trees)


def _relink(text: str, folder: Path) -> str:
    "Links to files that are no page of the site lead to GitHub; Jupyter's anchors become the site's."

    def one(link: re.Match) -> str:
        before, target, anchor = link.groups()
        path = (folder / target).resolve()
        name = path.relative_to(ROOT).as_posix()
        is_page = path.suffix in (".md", ".ipynb") and not name.startswith("clip475/")
        if is_page or not path.exists():
            return f"{before}{target}{anchor.lower()}"
        kind = "tree" if path.is_dir() else "blob"
        return f"{before}{_settings['git_url']}/{kind}/{_settings['branch']}/{name}"

    return re.sub(r"((?<!!)\[[^]]*\]\()(?!\w+:)([^)#\s]*)(#[^)\s]*|)(?=\))", one, text)


def _image_options(outputs: list[dict]) -> dict[str, str]:
    "Alternative text of a cell's figures."
    kinds = ("image/png", "image/jpeg")
    options = [output.get("metadata", {}).get(kind, {}) for output in outputs for kind in kinds]
    texts = [option["alt"] for option in options if "alt" in option]
    return {"alt": " ".join(texts)} if texts else {}


def _read_notebook(text: str, folder: Path) -> str:
    "A notebook without what nbdev hides and without its directives, as a page of the site shows it."
    notebook = json.loads(text)
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = _relink(source, folder)
        elif cell["cell_type"] == "code":
            cell["source"] = re.sub(r"\A(#\|.*\n?)+", "", source)
            cell["metadata"]["mystnb"] = {"image": _image_options(cell["outputs"])}
            if re.match(r"#\|\s*hide\b", source):
                continue
        cells.append(cell)
    return json.dumps({**notebook, "cells": cells})


def _read(app, docname: str, source: list[str]) -> None:
    "Called with the text of each page before it is parsed."
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        source[0] = _read_notebook(source[0], path.parent)
    elif path.suffix == ".md":
        source[0] = _relink(source[0], path.parent)
    if docname == root_doc:
        source[0] += _contents()
    if docname == "docs/api":
        names = (
            f"- {{py:obj}}`clip475.{name} <clip475.{'.'.join(place)}>`"
            for name, place in clip475._FRONT_DOOR.items()
        )
        source[0] = source[0].replace("{{front_door}}", "\n".join(names))


def _defaults(app, what, name, obj, options, signature, returns):
    "Defaults such as `<factory>`, which are no Python and stop Sphinx at a signature, become `...`."
    return re.sub(r"= <.*?>+(?=[,)])", "= ...", signature or "") or signature, returns


def setup(app) -> dict[str, bool]:
    app.connect("source-read", _read)
    app.connect("autodoc-process-signature", _defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
