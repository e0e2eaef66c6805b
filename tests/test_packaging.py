"What an import loads, what the wheel carries, and that settings, constraints and documents agree."

import re
import sys
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from processes import finished

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "pandas",
    "matplotlib",
    "PIL",
    "pycocotools",
    "fastcore",
    "nbdev",
    "IPython",
)


def python(code, *flags, returns=0, **kwargs):
    return finished([sys.executable, *flags, "-c", code], returns, cwd=ROOT, **kwargs)


def settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements(key):
    return [Requirement(r) for r in settings()[key].split()]


def pins(python_version):
    "name → version of constraints.txt, as that Python reads it."
    lines = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    environment = {"python_version": python_version, "python_full_version": python_version + ".0"}
    return {
        r.name: next(iter(r.specifier)).version
        for r in lines
        if r.marker is None or r.marker.evaluate(environment)
    }


# ── importing ──


def test_import_loads_nothing_heavy():
    run = python(
        "import sys; before = set(sys.modules); import clip475; "
        f"print(sorted(set(sys.modules) - before & set({HEAVY})))"
    )
    loaded = python(f"import sys, clip475; print([m for m in {HEAVY} if m in sys.modules])")
    assert run.stdout.strip() == loaded.stdout.strip() == "[]"


def test_names_of_the_front_door_load_nothing_before_they_are_used():
    "All names are listed, and listing them imports no module of the package."
    run = python(
        "import sys, clip475; names = [n for n in dir(clip475) if n in clip475.__all__]; "
        "print(len(names) == len(clip475.__all__), sorted(m for m in sys.modules if m.startswith('clip475')))"
    )
    assert run.stdout.strip() == "True ['clip475']"


def test_core_does_not_load_torch_either():
    loaded = python(f"import sys, clip475.core.config; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.stdout.strip() == "[]"


def test_submodules_load_when_asked_for():
    run = python(
        "import clip475; "
        "print(clip475.LabConfig().preset, 'core' in dir(clip475), hasattr(clip475, 'nonsense'))"
    )
    assert run.stdout.split() == ["tiny", "True", "False"]


def test_an_unknown_submodule_is_named_with_those_there_are():
    import clip475

    with pytest.raises(AttributeError, match="'nonsense'.*core"):
        _ = clip475.nonsense


def test_exported_code_imports_no_development_tool():
    for module in (ROOT / "clip475").rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import)\s+(nbdev|fastcore|execnb|ghapi)\b",
            module.read_text(encoding="utf-8"),
            re.MULTILINE,
        ), module.name


# ── settings, constraints and CONTRIBUTING agree ──


@pytest.mark.parametrize("key", ["requirements", "dev_requirements"])
def test_every_requirement_has_a_reason(key):
    reasons = dict(
        re.findall(
            r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    for r in requirements(key):
        assert len(reasons.get(r.name, "")) > 15, f"CONTRIBUTING.md gives no reason for {r.name}"


def test_no_reason_without_a_requirement():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| (?:package|tool) \| reason \|\n(.*?)\n(?!\|)", text, re.MULTILINE | re.DOTALL)
    given = {name for table in tables for name in re.findall(r"^\| `([^` ]+)` \|", table, re.MULTILINE)}
    keys = ("requirements", "dev_requirements", "photos_requirements", "heic_requirements")
    known = {r.name for key in keys for r in requirements(key)}
    assert len(tables) == 2 and given and given <= known


@pytest.mark.parametrize("python_version", PYTHONS)
def test_every_requirement_is_pinned_within_its_bounds(python_version):
    pinned = pins(python_version)
    for r in requirements("requirements") + requirements("dev_requirements"):
        assert r.name in pinned, f"constraints.txt does not pin {r.name} on Python {python_version}"
        assert r.specifier.contains(pinned[r.name]), f"{r.name} {pinned[r.name]} is outside {r.specifier}"


def test_requirements_of_the_lab_have_lower_bounds_and_no_upper_ones():
    "An upper bound would force another torch or numpy on Colab."
    for r in requirements("requirements"):
        assert [s.operator for s in r.specifier] == [">="], r


def test_one_version_everywhere():
    import clip475

    version = settings()["version"]
    assert clip475.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert (
        re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
        == version
    )


def test_one_lowest_python_everywhere():
    least = settings()["min_python"]
    wanted = f"({least.replace('.', ', ')})"
    for name in ("setup.py", "tools/find_python.sh", "clip475/__init__.py"):
        assert wanted in (ROOT / name).read_text(encoding="utf-8"), f"{name} does not ask for Python {least}"
    assert PYTHONS[0] == least


# ── a Python that is too old ──


def test_setup_tells_an_old_python_in_one_sentence():
    run_setup = "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    old = f"import sys; sys.version_info = (3, 10, 0); {run_setup}"
    run = python(old, returns=1)
    assert (
        run.stderr.startswith("clip475 needs Python 3.11 or newer and this is Python 3.10:")
        and run.stderr.count("\n") == 1
    )


def test_the_first_lines_parse_on_python_3_6():
    import ast

    for name in ("setup.py", "clip475/__init__.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script for make")
@pytest.mark.parametrize("reply", ["exit 127", "exit 1", "exit 3"])
def test_find_python_refuses_what_does_not_run_or_is_too_old(tmp_path, reply):
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{reply}\n")
    (tmp_path / "python3").chmod(0o755)
    run = finished(["/bin/sh", ROOT / "tools" / "find_python.sh"], 1, env={"PATH": str(tmp_path)})
    assert run.stdout == ""
    assert run.stderr.startswith("clip475 needs Python 3.11 or newer") and run.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script for make")
def test_find_python_takes_a_newer_sibling(tmp_path):
    "python3 is a stand-in that fails, as version managers leave them; python3.12 works."
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.12").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for p in tmp_path.iterdir():
        p.chmod(0o755)
    run = finished(["/bin/sh", ROOT / "tools" / "find_python.sh"], env={"PATH": str(tmp_path)})
    assert run.stdout.strip() == str(tmp_path / "python3.12")


# ── a pair of torch and torchvision that does not import ──


def test_a_pair_that_does_not_import_gets_one_sentence(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torch.py").write_text("")
    check = "import runpy; runpy.run_path('tools/check_install.py')"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {check}"
    run = python(code, returns=1)
    assert run.stderr.count("\n") == 1
    assert "torchvision::nms" in run.stderr and "constraints.txt" in run.stderr


def test_the_command_tells_a_missing_package_in_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    run = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules['clip475.app.cli'] = None; "
        "from clip475.__main__ import main; sys.exit(main([]))",
        returns=2,
    )
    assert run.stdout == ""
    assert run.stderr.startswith("clip475: ") and run.stderr.count("\n") == 1


# ── the wheel ──


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (
        "setup.py",
        "settings.ini",
        "pyproject.toml",
        "README.md",
        "MANIFEST.in",
        "LICENSE",
        "constraints.txt",
    ):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for file in (*(ROOT / "clip475").rglob("*"), *(ROOT / "nbs" / "course").glob("*.ipynb")):
        if file.is_file() and "__pycache__" not in file.parts:
            (source / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (source / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    finished(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            out,
            source,
        ]
    )
    return next(out.glob("*.whl"))


def test_wheel_carries_every_module_and_the_text_tower(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = [f for f in (ROOT / "clip475").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {f.relative_to(ROOT).as_posix() for f in wanted} <= inside


def test_wheel_carries_the_students_notebooks_and_no_solutions(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".ipynb")}
    assert inside == {f"clip475/course/{file.name}" for file in (ROOT / "nbs" / "course").glob("*.ipynb")}


def test_wheel_is_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.compress_size for info in archive.infolist()}
    head = sizes.pop("clip475/photos_model/model.safetensors")
    assert head <= 5e6 and sum(sizes.values()) <= 5 * 2**20


def test_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata, entries = (
        next(archive.read(n).decode() for n in archive.namelist() if n.endswith(end))
        for end in ("/METADATA", "/entry_points.txt")
    )
    assert f"Requires-Python: >={settings()['min_python']}" in metadata and "Apache-2.0" in metadata
    assert "clip475 = clip475.__main__:main" in entries
    assert "License-Expression: Apache-2.0 AND MIT" in metadata and "Project-URL: Issues" in metadata


def test_readme_of_the_wheel_has_whole_links(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA"))
    targets = re.findall(r"\]\(([^)]*)\)", metadata)
    assert len(targets) > 40
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "clip475/raw/main/docs/photo_search.jpg" in metadata


def test_versions_of_constraints_are_versions():
    for python_version in PYTHONS:
        for v in pins(python_version).values():
            Version(v)
