"""The rules of the layout: the order of imports, what is public, how wide lines are, and where links lead.

Nothing is imported and nothing is run: modules are parsed, notebooks are read as JSON. Each rule has one test
for each module or notebook, so that a failure names the file."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clip475"
PACKAGES = ("core", "data", "models", "training", "evaluation", "searching", "studies", "app")
MOST_PUBLIC_NAMES = 170
WIDEST_LINE = 110


def read_notebook(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def cells_of(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read_notebook(path) if cell["cell_type"] == kind]


def notebooks(folder: str) -> list[Path]:
    found = sorted((ROOT / "nbs" / folder).rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts and path.name[0] != "_"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MODULES = sorted(path for package in PACKAGES for path in (PACKAGE / package).glob("[!_]*.py"))
LIBRARY = notebooks("lib")
COURSE = notebooks("course")
ALL_NOTEBOOKS = notebooks(".")
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PYTHON_FILES = sorted(
    path
    for folder in ("clip475", "tests", "bench", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "_modidx.py"
)
each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


# ── what a notebook says of itself ──

KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=name_of)
def test_a_notebook_names_its_kernel_and_nothing_else(path):
    "Without it Jupyter asks for a kernel, and pages made from the notebook have no colours in their code."
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"] == {"kernelspec": KERNEL}


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=name_of)
def test_every_kept_figure_has_an_alternative_text(path):
    "`core.figures` writes it when a figure is shown; `Image` and `display` take one."
    for cell in read_notebook(path):
        for output in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & set(output.get("data", {})):
                assert output["metadata"].get(kind, {}).get("alt"), (
                    f"cell {cell['id']}: run the notebook anew, or give its figure an alternative text"
                )


# ── the order of packages and modules ──


def module_of(notebook: Path) -> str:
    "The module that a notebook is exported to, as `package.module`."
    exported = [re.match(r"#\|\s*default_exp\s+(\S+)", cell) for cell in cells_of(notebook, "code")]
    return next(found[1] for found in exported if found)


def place_of(notebook: Path) -> tuple[int, str]:
    "Where a notebook stands in the order: the number of its package, then its own."
    return PACKAGES.index(notebook.parent.name), re.match(r"\d+", notebook.name)[0]


ORDER = {module_of(path): place_of(path) for path in LIBRARY}


def imported_modules(text: str, path: Path) -> Iterator[str]:
    "Modules of clip475 that the `text` of the file `path` imports anywhere in it, as `package.module`."
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("clip475.") and name.removeprefix("clip475.") in ORDER:
                yield name.removeprefix("clip475.")


def test_every_module_has_one_notebook():
    exported = [f"{path.parent.name}.{path.stem}" for path in MODULES]
    assert sorted(map(module_of, LIBRARY)) == sorted(exported)


@each_module
def test_a_module_imports_only_what_stands_before_it(path):
    own = f"{path.parent.name}.{path.stem}"
    wrong = {name for name in imported_modules(path.read_text(), path) if ORDER[name] >= ORDER[own]}
    assert not wrong, f"{own} imports {', '.join(sorted(wrong))}, which come later in the order of nbs/lib"


def third_parties(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@each_module
def test_the_library_never_imports_the_course(path):
    assert not {"nbs", "course", "solutions"} & set(third_parties(path))


# ── what is public ──


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    "Public functions and classes of a module, and the methods of those classes that have no private name."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = set(public_names(tree))
    for node in tree.body:
        if getattr(node, "name", None) not in public:
            continue
        yield node.name, node
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef) and (part.name[0] != "_" or part.name.endswith("__")):
                yield f"{node.name}.{part.name}", part


def unannotated(function: ast.FunctionDef) -> list[str]:
    "The parameters of a function without an annotation, and `return` if that has none."
    spec = function.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    missing = [p.arg for p in parameters if p and p.annotation is None and p.arg not in ("self", "cls")]
    if function.returns is None and function.name != "__init__":
        missing.append("return")
    return missing


@each_module
def test_public_functions_are_annotated(path):
    functions = [(n, node) for n, node in public_definitions(path) if not isinstance(node, ast.ClassDef)]
    missing = {name: unannotated(node) for name, node in functions if unannotated(node)}
    assert not missing


@each_module
def test_public_names_have_a_docstring(path):
    named = [(name, node) for name, node in public_definitions(path) if not name.endswith("__")]
    assert not [name for name, node in named if not ast.get_docstring(node)]


def test_public_names_are_few():
    counts = {}
    for path in MODULES:
        names = public_names(ast.parse(path.read_text(encoding="utf-8")))
        counts[f"{path.parent.name}.{path.stem}"] = len(names)
    assert sum(counts.values()) <= MOST_PUBLIC_NAMES, counts


# ── lines ──


def wide_lines(text: str) -> list[str]:
    return [
        f"{i}: {len(line)} columns" for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDEST_LINE
    ]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_lines_of_a_file_fit(path):
    text = path.read_text(encoding="utf-8")
    if "AUTOGENERATED! DO NOT EDIT!" in text[:400]:  # two parts are not written as code
        text = re.sub(r'\A""".*?"""$', "", text, flags=re.DOTALL | re.MULTILINE)  # the notebook's promise
        text = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.DOTALL | re.MULTILINE)  # wrapped by nbdev
    assert not wide_lines(text)


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=name_of)
def test_lines_of_a_notebook_fit(path):
    wide = {i: wide_lines(cell) for i, cell in enumerate(cells_of(path, "code")) if wide_lines(cell)}
    assert not wide, "code cells with wide lines"


# ── links ──

COLAB = "https://colab.research.google.com/github/clip475/clip475/blob/main/"
LINK = re.compile(r"""\]\(([^)\s]+)(?:\s+"[^"]*")?\)|(?:href|src)=["']([^"']+)["']""")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def links_in(text: str) -> list[str]:
    return ["".join(found) for found in LINK.findall(CODE.sub("", text))]


def leads_somewhere(link: str, folder: Path) -> bool:
    if link.startswith(COLAB):
        return (ROOT / link.removeprefix(COLAB)).is_file()
    if re.match(r"[a-z]+:|#", link):  # another site, an attachment, or a place on the same page
        return True
    return (folder / link.split("#")[0]).exists()


@pytest.mark.parametrize("path", [*ALL_NOTEBOOKS, *TEXTS], ids=name_of)
def test_links_lead_somewhere(path):
    texts = cells_of(path, "markdown") if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    links = [link for text in texts for link in links_in(text)]
    assert not [link for link in links if not leads_somewhere(link, path.parent)]


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_badge_opens_this_notebook(path):
    badges = [
        link for text in cells_of(path, "markdown") for link in links_in(text) if link.startswith(COLAB)
    ]
    assert badges in ([], [COLAB + name_of(path)])


@pytest.mark.parametrize("path", [*LIBRARY, *COURSE], ids=name_of)
def test_nothing_imports_a_development_tool(path):
    tools = re.compile(r"^\s*(from|import)\s+(nbdev|fastcore|execnb|ghapi)\b", re.MULTILINE)
    cells = [cell for cell in cells_of(path, "code") if not re.match(r"#\|\s*hide", cell)]
    assert not [cell for cell in cells if tools.search(cell)]


# ── the rules themselves can fail ──


def test_the_rules_see_what_they_forbid(tmp_path):
    function = ast.parse("def f(a, b: int, *c, d=1): pass").body[0]
    assert unannotated(function) == ["a", "d", "c", "return"]
    assert wide_lines("x\n" + "y" * 111) == ["2: 111 columns"]
    assert links_in('[a](b.ipynb#c) <a href="d.md"> `[no](link)`') == ["b.ipynb#c", "d.md"]
    assert not leads_somewhere("nowhere.ipynb", tmp_path) and not leads_somewhere(
        COLAB + "no.ipynb", tmp_path
    )
    late = PACKAGE / "core" / "late.py"
    assert list(imported_modules("from ..app.report import run_lab", late)) == ["app.report"]
    assert list(imported_modules("def f():\n    import clip475.app.report", late)) == ["app.report"]
