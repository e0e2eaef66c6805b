"The training loop that students write in lesson 6, against the library's, from the same data and seed."

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clip475.core.config import LabConfig
from clip475.training.batches import prepare_data
from clip475.training.runs import fit
from clip475.training.steps import start_training

LESSONS = Path(__file__).resolve().parent.parent / "nbs" / "course" / "solutions"
CONFIG = LabConfig.from_preset(
    "tiny", train_images=72, val_images=24, image_size=32, batch_size=16, epochs=3, precision="fp32"
)


def functions_of(lesson, namespace):
    "Run the cells of a lesson that only import or define, in `namespace`; returns it."
    cells = json.loads((LESSONS / lesson).read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        source = "".join(cell["source"])
        defines = re.match(r"(import|from|def|class) |@", source) and "%pip" not in source
        if cell["cell_type"] == "code" and defines:
            definitions = source.split("\n\n\n[")[0]  # a cell may show an example below its function
            exec(compile(definitions, lesson, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def lesson_6():
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("CLIP475_CACHE", "")  # the lesson sets a folder of its own
        threads = torch.get_num_threads()
        yield functions_of("06_training.ipynb", {"config": CONFIG, "__name__": "lesson_6"})
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("CLIP475_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare_data(CONFIG, progress=False)


def test_the_lessons_loop_takes_the_librarys_steps_to_the_last_bit(lesson_6, data, tmp_path):
    train, val = data
    state = fit(CONFIG, train, val, tmp_path / "run", progress=False)

    model = lesson_6["new_model"]()
    losses, rows = lesson_6["train"](model, train, val, CONFIG)

    mine, library = model.state_dict(), state.model.state_dict()
    assert mine.keys() == library.keys()
    assert [name for name in mine if not torch.equal(mine[name], library[name])] == []
    assert losses == [row["loss"] for row in state.log]
    assert [row["validation loss"] for row in rows] == [row["val_loss"] for row in state.metrics]


def test_these_steps_changed_the_image_encoder_and_not_the_text_encoder(lesson_6, data):
    start = start_training(CONFIG).model.state_dict()
    model = lesson_6["new_model"]()
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())

    lesson_6["train"](model, *data, CONFIG.replace(epochs=1))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(start[name], tensor)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= set(changed)
    assert not any(name.startswith("text_encoder.") for name in changed)


def test_another_seed_gives_other_weights(lesson_6, data):
    other = CONFIG.replace(seed=7, epochs=1)
    models = [lesson_6["new_model"](), lesson_6["new_model"]()]
    for model, config in zip(models, (CONFIG.replace(epochs=1), other), strict=True):
        lesson_6["config"] = config
        lesson_6["train"](model, *data, config)
    lesson_6["config"] = CONFIG
    assert not torch.equal(models[0].image_encoder.head[0].weight, models[1].image_encoder.head[0].weight)


def test_every_caption_takes_part_sooner_or_later(lesson_6, data):
    owners = data[0].split.caption_image
    draw = lesson_6["one_caption_each"]
    drawn = [draw(owners, CONFIG.seed, epoch) for epoch in range(60)]
    assert all(np.array_equal(owners[rows], np.arange(len(data[0]))) for rows in drawn)
    assert len(torch.cat(drawn).unique()) == len(owners)


def test_the_lessons_loop_is_short():
    "About 30 lines for the loop and its step, as the lesson says."
    source = (LESSONS / "06_training.ipynb").read_text(encoding="utf-8")
    cells = ["".join(cell["source"]) for cell in json.loads(source)["cells"]]
    loop = next(cell for cell in cells if cell.startswith("def train("))
    step = next(cell for cell in cells if cell.startswith("def train_step("))
    lines = [line for line in (loop + "\n" + step).splitlines() if line.strip() and "###" not in line]
    assert len(lines) <= 42


def test_lesson_4_quotes_the_kept_measurement():
    kept = json.loads((LESSONS.parents[2] / "results" / "frozen_memory.json").read_text(encoding="utf-8"))
    lesson = json.loads((LESSONS / "04_freezing.ipynb").read_text(encoding="utf-8"))
    cell = next(
        "".join(c["source"]) for c in lesson["cells"] if "frozen_memory.json:" in "".join(c["source"])
    )
    quoted = {}
    exec(cell, quoted)
    ways = [kept["ways"][name] for name in ("trained", "encoded", "cached")]
    for part, values in quoted["fixed_bytes"].items():
        assert values == [way["fixed"][part] for way in ways]
    for part, values in quoted["seconds"].items():
        measured = [way["seconds"]["step" if part == "optimizer step" else part] for way in ways]
        assert values == pytest.approx(measured, abs=1e-5)
