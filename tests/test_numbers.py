"""Every measurement in the prose has a source: an output of the same notebook, or a kept result.

A number counts as a measurement if it has a unit or decimals. Its source is, within the digits shown, one of

- the outputs of its notebook, or a setting in its code;
- a file in results/ that the notebook or document names;
- `12.3 %<!-- photos.json head/i2t_R@1 -->`: exactly that entry of that file, for numbers that would else
  be found by luck.

What cannot be known stands in ELSEWHERE, with the reason. On a page in STRICT each number, with or without a
unit, has a mark, but for those in its tables of plan and points, which have tests of their own.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"

UNIT = (
    r"\s?(?:%|percent|points?|times|ms|µs|seconds?|minutes?|hours?|s|[MGkKT]B|(?:images|pictures|captions|"
    r"queries|scenes)/s|[GT]?FLOPs?|(?:million |billion )?(?:parameters|weights|multiply-adds))(?![\w/])"
)
WORDS = {
    word: number
    for number, word in enumerate(
        "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split(), 11
    )
}
NUMBER = re.compile(
    r"(?<![\w.,/#=×@:^_])(?P<digits>\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?(?![\w.]*[a-zA-Z_]\w)"
    rf"(?P<unit>{UNIT})?(?:<!--(?P<mark>[^>]*)-->)?"
)
LEFT_OUT = [
    r"```.*?```",
    r"`[^`]*`",
    r"\$\$.*?\$\$",
    r"\$[^$]*\$",
    r"<details>.*?</details>",
    r"!\[[^\]]*\]\([^)]*\)",
    r"(?<=\])\([^)]*\)",
    r"<(?!!--)[^>]*>",
    r"^#.*$",
    r"https?://\S+",
    r"\*\d+ minutes to read[^*]*\*",
    r"\*\*Reading and running:\*\*.*",
    r"\(★+, \d+ minutes\)",
    r"^- \*\*\d+\.\d+ ",
    r"arXiv[: ]?\d+\.\d+",
    r"\b(?:[Ss]ection|[Tt]able|[Ff]igure|Fig\.|eq\.|[Ee]xercise|version|Python|CC BY|CC BY-SA) \d+(?:\.\d+)*",
    r"\b95 %(?= interval| confidence)",
    r"\b\d{4}\.\d{5}\b",
]

# (end of the path, words beside the number): why no source can be read here
ARITHMETIC = "arithmetic that the sentence itself shows, or that follows from its numbers"
PAPER = "quoted from the paper that is named beside it"
PUBLISHED = "the size of files that others publish"
STORY = "a made-up example, or an exercise"
ELSEWHERE: dict[tuple[str, str], str] = {
    ("01_pairs.ipynb", "4:3 (1.33)"): ARITHMETIC,
    ("03_two_towers.ipynb", "589,824 weights"): ARITHMETIC,
    ("04_freezing.ipynb", "0.76 of 1.47 GB"): ARITHMETIC,
    ("04_freezing.ipynb", "another 0.25 GB"): ARITHMETIC,
    ("05_loss.ipynb", "B = 128 the same model starts at 4.85"): ARITHMETIC,
    ("08_searching.ipynb", "10 of 300 is 3.3 %"): ARITHMETIC,
    ("08_searching.ipynb", "35 of 67, or 52 %"): ARITHMETIC,
    ("09_the_space.ipynb", "hold 23 % of the spread"): ARITHMETIC,
    ("10_ablation.ipynb", "Twelve trainings"): ARITHMETIC,
    ("11_hand_in.ipynb", "28.8 million parameters"): ARITHMETIC,
    ("11_hand_in.ipynb", "Fifteen common mistakes"): "the title of lesson 12, whose cases are counted there",
    ("02_scenes.ipynb", "sixteen kinds of things"): "counted in data/01_drawings",
    ("07_download.ipynb", "nineteen stay"): ARITHMETIC,
    ("02_held_out.ipynb", "ln 16 = 2.77"): ARITHMETIC,
    ("12_mistakes.ipynb", "4.16 is ln 64"): ARITHMETIC,
    ("13_full_run.ipynb", "one image costs 24.5 billion"): ARITHMETIC,
    ("13_full_run.ipynb", "63,428,096 parameters"): STORY,
    ("04_teaching_panels.ipynb", "44 %, and not the specification's 31 %"): ARITHMETIC,
    ("05_figures.ipynb", "ln 128"): ARITHMETIC,
    ("07_download.ipynb", "COCO 2014 is 19 GB"): PUBLISHED,
    ("07_download.ipynb", "3.2 GB, if only those"): ARITHMETIC,
    ("11_photos.ipynb", "2.3 MB in the package"): PUBLISHED,
    ("01_ranks.ipynb", "would fill 66 GB"): ARITHMETIC,
    ("01_ranks.ipynb", "would take 33 GB"): ARITHMETIC,
    ("04_zeroshot.ipynb", "CLIP gained 3.5 points"): PAPER,
    ("05_tables.ipynb", "trainable parameters (460 MB)"): ARITHMETIC,
    ("03_folder.ipynb", "10,000 photographs are some 30 GB"): STORY,
    ("02_large_batches.ipynb", "350 GB for a batch"): ARITHMETIC,
    ("02_large_batches.ipynb", "2.5 times as much"): ARITHMETIC,
    ("04_batches.ipynb", "4.1 billion multiply-adds"): PUBLISHED,
    ("04_batches.ipynb", "25 GFLOP"): ARITHMETIC,
    ("09_meters.ipynb", "the tower of 254 MB"): ARITHMETIC,
}


STRICT = {"instructors.md"}
PLAN = re.compile(r"^\| (\d+)(?:, | to )(\d+) \| (.*?) \| (\d+) \|", re.MULTILINE)  # days, lessons, minutes
POINTS = re.compile(r"^\| [a-z, -]+ \| (\d+) \|", re.MULTILINE)
NAMES = r"Lesson \d+|COCO 2014"


def prose(markdown):
    for pattern in LEFT_OUT:
        markdown = re.sub(pattern, " ", markdown, flags=re.DOTALL | re.MULTILINE if "*?" in pattern else re.M)
    return markdown


def numbers_of(text):
    "All numbers in a text, without separators of thousands."
    found = re.findall(r"(?<![\w.])-?\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?", text)
    return {abs(float(one.replace(",", "").replace("_", ""))) for one in found}


def leaves(value):
    "All numbers in JSON."
    if isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield abs(float(value))
    elif isinstance(value, str):
        yield from numbers_of(value)


@cache
def kept(name):
    text = (RESULTS / name).read_text(encoding="utf-8")
    return frozenset(leaves(json.loads(text)) if name.endswith(".json") else numbers_of(text))


def entry(mark):
    "The numbers in the entry of a kept result that a mark names: FILE KEY/KEY/…"
    name, _, path = mark.strip().partition(" ")
    value = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    for key in path.split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return sorted(leaves(value))


def agrees(shown, decimals, value):
    "Whether `value`, or its percentage or a power of a thousand of it, rounds to the number shown."
    scales = (1, 100, 1e-3, 1e-6, 1e-9, 1e3, 1e6)
    if any(abs(round(value * scale, decimals) - shown) < 1e-9 for scale in scales):
        return True
    if decimals or shown < 100:
        return False
    zeros = len(f"{shown:.0f}") - len(f"{shown:.0f}".rstrip("0"))  # "5,000" may stand for 4,987
    return any(zeros and round(value * scale, -min(zeros, 2)) == shown for scale in scales)


def output_text(cell):
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", []))
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", "".join(data), flags=re.DOTALL)


def read(path):
    "Paragraphs of prose, and the numbers that they may rest on."
    text = path.read_text(encoding="utf-8")
    own: set[float] = set()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        paragraphs = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        code = [c for c in cells if c["cell_type"] == "code"]
        for cell in code:
            own |= numbers_of("".join(cell["source"])) | numbers_of("\n".join(output_text(cell)))
    else:
        paragraphs = text.split("\n\n")
        own |= numbers_of("\n".join(re.findall(r"```.*?```", text, flags=re.DOTALL)))
    for name in set(re.findall(r"results/([\w.-]+\.(?:json|txt))", text)):
        if (RESULTS / name).is_file():
            own |= kept(name)
    return paragraphs, own


def documents():
    notebooks = [p for p in ROOT.glob("nbs/**/*.ipynb") if p.parent.name != "course"]
    others = [*ROOT.glob("docs/*.md"), *ROOT.glob("clip475/*/MODEL_CARD.md")]
    return sorted(p for p in [*notebooks, *others] if ".ipynb_checkpoints" not in p.parts)


def without_source(path):
    "The sentences whose number has no source, each with its number."
    paragraphs, own = read(path)
    strict = path.name in STRICT
    for paragraph in paragraphs:
        text = prose(paragraph)
        if strict:
            text = re.sub(rf"{PLAN.pattern}|{POINTS.pattern}|{NAMES}", " ", text, flags=re.MULTILINE)
        for match in NUMBER.finditer(text):
            digits, decimals, unit, mark = match.group("digits", "decimals", "unit", "mark")
            around = " ".join(text[max(0, match.start() - 70) : match.end() + 40].split())
            shown, places = float(digits.replace(",", "") + (decimals or "")), len(decimals or ".") - 1
            if mark:
                if not any(agrees(shown, places, value) for value in entry(mark)):
                    yield f"{match.group()!r} is not {entry(mark)}: …{around}…"
                continue
            measured = strict or bool(unit or decimals)
            if measured and (strict or not any(agrees(shown, places, value) for value in own)):
                yield f"{match.group()!r}: …{around}…"
        for match in re.finditer(rf"\b({'|'.join(WORDS)})\b", text, flags=re.IGNORECASE):
            if WORDS[match[1].lower()] not in own:
                around = " ".join(text[max(0, match.start() - 70) : match.end() + 40].split())
                yield f"{match.group()!r}: …{around}…"


def is_elsewhere(path, sentence):
    return any(str(path).endswith(end) and words in sentence for end, words in ELSEWHERE)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_in_prose_have_a_source(path):
    missing = [one for one in without_source(path) if not is_elsewhere(path, one)]
    assert not missing, "\n".join([f"{path.relative_to(ROOT)}: no output and no kept result has", *missing])


def test_the_plan_and_the_points_of_instructors():
    page = (ROOT / "docs" / "instructors.md").read_text(encoding="utf-8")
    minutes = {}
    for path in ROOT.glob("nbs/course/solutions/*.ipynb"):
        text = path.read_text(encoding="utf-8")
        minutes[int(path.name[:2])] = int(re.search(r"\*\*Exercises:\*\* (\d+) minutes", text)[1])
    days, planned = [], []
    for first, last, lessons, stated in PLAN.findall(page):
        numbers = [int(one) for one in re.findall(r"\d+", lessons)]
        assert int(stated) == sum(minutes[one] for one in numbers), lessons
        days += range(int(first), int(last) + 1)
        planned += numbers
    assert days == list(range(1, 15)) and sorted(planned) == sorted(minutes)
    assert sum(map(int, POINTS.findall(page))) == 100


def test_exceptions_are_needed():
    for end, words in ELSEWHERE:
        paths = [p for p in documents() if str(p).endswith(end)]
        assert any(words in one for p in paths for one in without_source(p)), f"{end}: {words} is not needed"


def test_a_changed_result_is_found(tmp_path, monkeypatch):
    (tmp_path / "kept.json").write_text('{"arm": {"R@1": 27.6}, "seconds": [310]}')
    page = tmp_path / "page.md"
    page.write_text("It finds 27.6 %<!-- kept.json arm/R@1 --> in 310 s (results/kept.json), among 7.9 GB.")
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    kept.cache_clear()
    assert [one.split("'")[1] for one in without_source(page)] == ["7.9 GB"]
    (tmp_path / "kept.json").write_text('{"arm": {"R@1": 26.1}, "seconds": [290]}')
    kept.cache_clear()
    assert len(list(without_source(page))) == 3
    kept.cache_clear()
    (tmp_path / "instructors.md").write_text("It finds 26.1 %<!-- kept.json arm/R@1 -->, as 290 others do.")
    assert [one.split("'")[1] for one in without_source(tmp_path / "instructors.md")] == ["290"]
