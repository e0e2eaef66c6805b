"""The full report and the hand-in: the zip runs alone, and nothing of another run gets into it.

The commands of Train.txt and Test.txt run in an empty folder, where only the package in the zip can be found
first; the recall that Test.txt gives is that of the report, to the last digit."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from processes import finished

from clip475.app import full_report
from clip475.app.full_report import _answers, _open_gaps, hyperparameter_table, report_run
from clip475.app.hand_in import hand_in
from clip475.app.report import evaluate_run, run_lab
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.studies.ablation import run_ablation

pytestmark = pytest.mark.usefixtures("one_thread")  # as OMP_NUM_THREADS in the processes: the same bits
TINY = {"epochs": 1, "batch_size": 16, "image_size": 32, "head_hidden": 64}
KEPT = Path(__file__).parents[1] / "results" / "ablation_photos.json"
STUDENTS = "20123456,20654321"
TOP = "20123456-20654321"


def answered(report):
    "A report with a line in every gap."
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("\n<!-- end of gap -->", "\nMy answer.\n\n<!-- end of gap -->"), "utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run on scenes, its report and its hand-in."
    folder = tmp_path_factory.mktemp("handin")
    torch.set_num_threads(1)  # before `one_thread`, which is of each test
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP475_CACHE", str(folder / "cache"))
        config = LabConfig.from_preset("tiny", train_images=32, val_images=24, **TINY)
        run_lab(config, folder / "run", progress=False)
        report_run(folder / "run", pdf=False, progress=False)
        answered(folder / "run" / "full_report.md")
        (folder / "mine.py").write_text("print('mine')\n")
        hand_in(folder / "run", STUDENTS, out=folder / "in.zip", code=[folder / "mine.py"])
        yield folder


@pytest.fixture(scope="module")
def unpacked(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    with ZipFile(place / "in.zip") as archive:
        archive.extractall(folder)
    return folder / TOP


def run_line(folder, name, place, *more, executable=sys.executable):
    "Run the command of Train.txt or Test.txt in the unpacked folder."
    lines = (folder / name).read_text("utf-8").splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    words = shlex.split(line)
    assert words[0] == "python"
    return python(folder, place, *words[1:], *more, executable=executable)


def python(folder, place, *words, executable=sys.executable):
    "Python as it starts in the unpacked folder, with no path to this repository."
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "CLIP475_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return finished([executable, *words], cwd=folder, env=environment).stdout


def recalls(results):
    return {way: results[way] for way in ("i2t", "t2i")}


# ── the hand-in runs alone ──


def test_the_zip_has_all_parts(unpacked):
    wanted = """Train.txt Test.txt report.md report.html requirements.txt environment.txt LICENCES.md
    code/mine.py
    run/config.json run/model.safetensors run/metrics.csv run/steps.csv run/split.json run/results.json
    run/figures/loss.png run/figures/similarity_all.png run/figures/queries.png clip475/__main__.py"""
    assert not [name for name in wanted.split() if not (unpacked / name).is_file()]
    about = json.loads((unpacked / "run" / "config.json").read_text("utf-8"))
    assert "still open" not in (unpacked / "report.html").read_text("utf-8")
    assert about["model_type"] == "clip475" and about["vision_config"]  # transformers refuses the folder
    assert not [p for p in unpacked.rglob("*") if "__pycache__" in p.parts or p.suffix == ".pt"]


def test_the_line_of_test_txt_gives_the_recall_of_the_report(place, unpacked):
    package = python(unpacked, place, "-c", "import clip475; print(clip475.__file__)").strip()
    assert Path(package).resolve() == (unpacked / "clip475" / "__init__.py").resolve()
    handed = json.loads((place / "run" / "results.json").read_text("utf-8"))
    found = json.loads(run_line(unpacked, "Test.txt", place, "--json"))
    assert recalls(found) == recalls(handed) and found["run_id"] == handed["run_id"]
    assert repr(handed["t2i"]["R@5"]) in (unpacked / "Test.txt").read_text("utf-8")


def test_the_line_of_train_txt_trains(place, unpacked):
    found = json.loads(run_line(unpacked, "Train.txt", place, "--json"))
    handed = json.loads((place / "run" / "results.json").read_text("utf-8"))
    assert recalls(found) == recalls(handed)  # the same seed, the same bits
    assert (unpacked / "new-run" / "model.safetensors").is_file()


@pytest.mark.skipif(
    os.environ.get("CLIP475_FRESH_ENVIRONMENT") != "1", reason="downloads torch: CLIP475_FRESH_ENVIRONMENT=1"
)
def test_the_hand_in_runs_with_what_its_requirements_name_and_nothing_else(place, unpacked, tmp_path):
    "As whoever marks it does: a new environment, and the two lines as they stand."
    finished([sys.executable, "-m", "venv", tmp_path / "fresh"])
    fresh = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin") / "python"
    finished([fresh, "-m", "pip", "install", "-q", "-r", unpacked / "requirements.txt"])
    handed = json.loads((place / "run" / "results.json").read_text("utf-8"))
    for name, more in (("Test.txt", []), ("Train.txt", ["--run", "fresh-run"])):
        found = json.loads(run_line(unpacked, name, place, "--json", *more, executable=fresh))
        assert recalls(found) == recalls(handed)


# ── one's own pictures ──


@pytest.fixture(scope="module")
def own(tmp_path_factory, place):
    "A run on one's own pictures, below a folder whose name must not matter."
    folder = tmp_path_factory.mktemp("own")
    torch.set_num_threads(1)
    pictures = folder / "my pictures"
    pictures.mkdir()
    rows = ["file,caption"]
    for i in range(40):
        Image.new("RGB", (40, 40), (6 * i, 255 - 6 * i, 40 * (i % 6))).save(pictures / f"{i:02}.png")
        rows.append(f"{i:02}.png,a {'red' if i % 2 else 'blue'} picture number {i}")
    (pictures / "captions.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP475_CACHE", str(place / "cache"))
        config = LabConfig.from_preset("tiny", data=str(pictures), train_images=24, val_images=12, **TINY)
        run_lab(config, folder / "run", progress=False)
        yield folder


def test_a_hand_in_on_own_pictures_takes_their_folder(own, place, tmp_path):
    found = hand_in(own / "run", "20123456", out=tmp_path / "in.zip", draft=True)
    assert found["test"] == "python -m clip475 eval --run run --data data"
    with ZipFile(tmp_path / "in.zip") as archive:
        archive.extractall(tmp_path)
        assert not [name for name in archive.namelist() if name.startswith("20123456/data/")]
    folder = tmp_path / "20123456"
    assert str(own) not in (folder / "run" / "config.json").read_text("utf-8")
    split = json.loads((folder / "run" / "split.json").read_text("utf-8"))["splits"]["val"]
    assert len(split["files"]) == len(split["contents"]) == 12
    shutil.copytree(own / "my pictures", folder / "data")
    again = evaluate_run(folder / "run", data=folder / "data")  # the line itself runs in a test above
    assert recalls(again) == recalls(json.loads((own / "run" / "results.json").read_text("utf-8")))


# ── another run's parts are refused, and open points too ──


@pytest.fixture
def copy(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(run, says, **options):
    target = run.parent / "out.zip"
    with pytest.raises(LabError, match=says):
        hand_in(run, STUDENTS, out=target, **options)
    assert not target.exists() and not list(run.parent.glob(".part-*"))


@pytest.mark.parametrize("draft", [False, True])
def test_parts_of_another_run_are_refused(copy, own, place, draft):
    other = own / "run" / "figures" / "loss.png"
    shutil.copy(other, copy / "figures" / "loss.png")
    refused(copy, "is a figure of run", draft=draft)
    shutil.copy(other, copy / "figures" / "recall.png")
    shutil.copy(place / "run" / "figures" / "loss.png", copy / "figures" / "loss.png")
    refused(copy, "is a figure of run", draft=draft)


def test_weights_of_another_run_are_refused(copy, own):
    shutil.copy(own / "run" / "model.safetensors", copy / "model.safetensors")
    refused(copy, "is the report of run", draft=True)
    (copy / "full_report.md").unlink()
    shutil.rmtree(copy / "figures")
    refused(copy, "results of run", draft=True)


def test_a_report_that_shows_another_runs_figure_is_refused(copy, own):
    report = copy / "full_report.md"
    text = report.read_text("utf-8")
    report.write_text(f"![Loss]({(own / 'run' / 'figures' / 'loss.png').as_posix()})\n\n{text}", "utf-8")
    refused(copy, "is a figure of run", draft=True)


def test_open_points_are_all_named_and_nothing_is_written(copy):
    report = copy / "full_report.md"
    report.write_text(report.read_text("utf-8").replace("My answer.", "", 1), "utf-8")
    (copy / "steps.csv").unlink()
    refused(copy, "1 gaps in full_report.md: introduction.*steps.csv missing")
    checked = hand_in(copy, STUDENTS, check=True)
    assert [p["part"] for p in checked["checklist"] if p["status"] == "open"] == ["report", "run"]
    assert checked["zip"] is None and not list(copy.parent.glob("*.zip"))


def test_what_is_too_large_is_named(copy):
    (size,) = [p for p in hand_in(copy, STUDENTS, check=True, limit=1)["checklist"] if p["part"] == "size"]
    assert size["status"] == "note" and "model.safetensors" in size["detail"]


def test_another_file_is_not_replaced_and_an_earlier_hand_in_is(copy):
    target = copy.parent / "out.zip"
    with ZipFile(target, "w") as archive:
        archive.writestr("holiday.txt", "photos")
    with pytest.raises(LabError, match="something else has this name"):
        hand_in(copy, STUDENTS, out=target)
    assert ZipFile(target).namelist() == ["holiday.txt"]
    target.unlink()
    assert hand_in(copy, STUDENTS, out=target)["zip"] == hand_in(copy, STUDENTS, out=target)["zip"]


def test_a_full_disk_leaves_the_earlier_hand_in(copy, monkeypatch):
    target = copy.parent / "out.zip"
    hand_in(copy, STUDENTS, out=target)
    before = target.read_bytes()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ZipFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        hand_in(copy, STUDENTS, out=target)
    assert target.read_bytes() == before and not list(copy.parent.glob(".part-*"))


@pytest.mark.parametrize("students", ["", "20123456,", "20123456,20123456", "2012/../3456", "Anna"])
def test_what_is_no_student_number_is_refused(copy, students):
    with pytest.raises(LabError, match="--students"):
        hand_in(copy, students, check=True)


# ── the report ──


def test_a_new_report_keeps_the_answers(copy, place, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(place / "cache"))
    before = _answers((copy / "full_report.md").read_text("utf-8"))
    assert set(before.values()) == {"My answer."}
    done = report_run(copy, pdf=False, progress=False)
    assert _answers(Path(done["markdown"]).read_text("utf-8")) == before and done["gaps"] == []


def test_a_real_ablation_is_in_the_report_and_in_the_hand_in(copy, place, tmp_path, monkeypatch):
    "Tables with words instead of Python's braces, and the next report has them too."
    monkeypatch.setenv("CLIP475_CACHE", str(place / "cache"))
    config = LabConfig.from_preset("tiny", train_images=32, val_images=24, **TINY)
    found = run_ablation(config, {"A": "augment=flip"}, tmp_path / "study", seeds=2, progress=False)
    done = report_run(copy, out=tmp_path / "r.md", ablation=tmp_path / "study", pdf=False, progress=False)
    text = Path(done["markdown"]).read_text(encoding="utf-8")
    section = text[text.index("## Ablation study") : text.index("## Discussion")]
    assert all(sentence in section for sentence in [*found["sentences"], found["power"]])
    assert "| A | augment=flip |" in section and "| gallery and queries | 24 images" in section
    assert "{" not in section and "'" not in section
    assert "](run/figures/loss.png)" in text  # the links lead to the run from where the report is
    again = report_run(copy, pdf=False, progress=False)  # without --ablation
    assert found["power"] in Path(again["markdown"]).read_text(encoding="utf-8")
    with ZipFile(hand_in(copy, STUDENTS, out=tmp_path / "in.zip", draft=True)["zip"]) as archive:
        assert json.loads(archive.read(f"{TOP}/run/ablation.json"))["arms"] == found["arms"]
        assert f"{TOP}/run/figures/ablation.png" in archive.namelist()


@pytest.mark.skipif(not KEPT.is_file(), reason="the kept results are not here")
def test_the_kept_ablation_on_photographs_gets_its_tables(copy, place, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(place / "cache"))
    done = report_run(copy, out=tmp_path / "r.md", ablation=KEPT, pdf=False, progress=False)
    text = Path(done["markdown"]).read_text(encoding="utf-8")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert all(sentence in text for sentence in kept["sentences"]) and "| 1,000 images" in text


@pytest.mark.parametrize("content", ['{"arms": 3}', "[]", '{"arms": {}, "effects": {}}'])
def test_another_file_is_not_taken_for_an_ablation(copy, place, tmp_path, monkeypatch, content):
    monkeypatch.setenv("CLIP475_CACHE", str(place / "cache"))
    (tmp_path / "ablation.json").write_text(content)
    with pytest.raises(LabError, match="is no ablation"):
        report_run(copy, out=tmp_path / "r.md", ablation=tmp_path, pdf=False, progress=False)
    assert not (copy / "ablation.json").exists()


def test_a_foreign_file_is_not_written_over(copy):
    (copy.parent / "thesis.md").write_text("# My thesis\n")
    with pytest.raises(LabError, match="no report that clip475 wrote"):
        report_run(copy, out=copy.parent / "thesis.md", pdf=False, progress=False)
    assert (copy.parent / "thesis.md").read_text() == "# My thesis\n"


def test_without_a_browser_the_report_says_so(copy, monkeypatch):
    report = copy / "full_report.md"
    report.write_text(report.read_text("utf-8").replace("## Method", "## My method"), "utf-8")
    monkeypatch.setattr(full_report, "_BROWSERS", ("no-such-browser",))
    done = report_run(copy, progress=False)
    assert done["pdf"] is None and any("no PDF" in note for note in done["notes"])
    assert any("outside of its gaps" in note for note in done["notes"])
    assert "My method" in Path(done["html"]).read_text("utf-8")


def test_html_of_a_student_is_shown_and_not_run(tmp_path):
    page = full_report._to_html("# T\n\n<script>alert(1)</script>\n", tmp_path, "0")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_every_field_has_a_source_and_a_reason():
    for preset in ("coco", "photos", "tiny"):
        table = hyperparameter_table(LabConfig.from_preset(preset))
        assert table.reason.str.len().min() > 5 and len(table) == len(LabConfig.__dataclass_fields__)
    assert "your choice" not in set(hyperparameter_table(LabConfig.from_preset("coco")).source)


def test_a_gap_is_open_until_it_has_a_line_of_its_own():
    gap = full_report._gap("end", "Conclusion", "What?", "Why?")
    assert _open_gaps(gap) == ["end"]
    assert _open_gaps(gap.replace("> 2. Why?", "> 2. Why? Because.")) == ["end"]
    assert _open_gaps(gap.replace("\n<!-- end", "\nBecause.\n<!-- end")) == []
