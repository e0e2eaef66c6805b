"CONTRIBUTING says where everything is: that page names every module, in order, and fits one screen."

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGE = re.search(r"## Where is what\n(.*?)\n## ", TEXT, re.DOTALL).group(1)


def modules_in_order(package):
    "The modules of a package, in the order of their notebooks."
    notebooks = sorted((ROOT / "nbs" / "lib" / package).glob("[0-9]*.ipynb"))
    return [re.search(r"#\| default_exp ([\w.]+)", n.read_text(encoding="utf-8")).group(1) for n in notebooks]


def test_every_module_stands_on_the_page_in_order():
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.*?`) \|", PAGE, re.MULTILINE))
    packages = [p.parent.name for p in (ROOT / "clip475").glob("*/__init__.py")]
    assert sorted(rows) == sorted(packages)
    for package, names in rows.items():
        expected = [module.removeprefix(f"{package}.") for module in modules_in_order(package)]
        assert re.findall(r"`(\w+)`", names) == expected, f"CONTRIBUTING.md, row {package}"


def test_the_page_fits_one_screen():
    assert len(PAGE.strip().splitlines()) <= 40


def test_every_path_on_the_page_exists():
    for path in re.findall(r"`((?:nbs|clip475|tests|results|bench|tools)/[\w./*-]*)`", PAGE):
        assert list(ROOT.glob(path.rstrip("/"))), f"CONTRIBUTING.md names {path}, which is not there"
