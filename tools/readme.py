"""README.md, written from nbs/index.ipynb:  python tools/readme.py

Lines that begin with `#|`, the source of cells under `#| echo: false`, and cells under `#| hide` are for
nbdev and left out, and so is the install cell for Colab.
Links that are relative to nbs/ become relative to the repository; figures go to docs/readme/.
The same notebook always gives the same bytes: tests/test_readme.py compares them.
"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "docs/readme"
HIDDEN = "# hidden"  # stands for the source of a cell that shows its output only


def shown(cell):
    "The cell as a reader of the README sees it, or None."
    if cell.cell_type == "code":
        flags = [
            line.removeprefix("#|").strip() for line in cell.source.splitlines() if line.startswith("#|")
        ]
        if "hide" in flags or "google.colab" in cell.source:
            return None
        cell.source = "\n".join(
            line for line in cell.source.splitlines() if not line.startswith("#|")
        ).strip()
        if "echo: false" in flags:
            cell.source = HIDDEN
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return cell if cell.source.strip() else None


def relink(text, folder):
    "Links that name a file beside the notebook, now seen from the repository's root."

    def one(match):
        before, target, after = match.groups()
        path = (folder / target.split("#")[0]).resolve()
        inside = "://" not in target and path.exists() and path.is_relative_to(ROOT)
        return (
            before
            + (str(path.relative_to(ROOT)) + target[len(target.split("#")[0]) :] if inside else target)
            + after
        )

    return re.sub(r'(\]\(|src="|href=")([^)"#\s][^)"\s]*)(\)|")', one, text)


def render(notebook=ROOT / "nbs" / "index.ipynb"):
    "The README's text, and its figures as name → bytes."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in map(shown, nb.cells) if c is not None]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, notebook.parent)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = relink(output.data["text/markdown"], notebook.parent)
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"output_files_dir": FIGURES, "unique_key": "figure"}
    )
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.DOTALL)
    text = text.replace(f"```python\n{HIDDEN}\n```\n", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    note = "<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->\n"
    return note + text, {Path(name).name: data for name, data in sorted(resources.get("outputs", {}).items())}


def write(root=ROOT):
    "Write README.md and its figures; figures that are no longer shown are removed."
    text, figures = render()
    (root / "README.md").write_text(text, encoding="utf-8", newline="\n")
    folder = root / FIGURES
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        if old.name not in figures:
            old.unlink()
    for name, data in figures.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    write()
