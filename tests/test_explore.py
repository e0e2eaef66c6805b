"The panels without a browser: plain functions, every error shown in the panel, ipywidgets 7 and 8."

import json
import math
import re
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.models.joint import build_model
from clip475.training.batches import prepare_data

widgets = pytest.importorskip("ipywidgets")
import clip475.app.panels as panels
import clip475.app.teaching_panels as teaching

NOTEBOOKS = sorted((Path(__file__).parents[1] / "nbs/lib/app").glob("*panels.ipynb"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "An untrained model and 20 scenes: the panels must work whatever the answers are worth."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP475_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = LabConfig.from_preset("tiny", train_images=64, val_images=20, image_size=32)
        torch.manual_seed(0)
        (val,) = prepare_data(config, progress=False, names=("val",))
        yield panels._make_lab(build_model(config), config, val)


def png(width=9, height=9, mode="RGB"):
    data = BytesIO()
    Image.new(mode, (width, height)).save(data, "PNG")
    return data.getvalue()


def upload(file, data, name="own.png"):
    "What a browser does to a FileUpload, in the version of ipywidgets that is installed."
    if int(widgets.__version__.split(".")[0]) < 8:
        file.metadata, file.data, file._counter = [{"name": name}], [data], file._counter + 1
    else:
        file.value = (
            {
                "name": name,
                "type": "image/png",
                "size": len(data),
                "content": memoryview(data),
                "last_modified": datetime.now(),
            },
        )


def alert(output):
    return "role=alert" in output.value


PANELS = [
    panels.search_panel,
    panels.zeroshot_panel,
    teaching.token_panel,
    teaching.temperature_panel,
    teaching.freezing_panel,
    teaching.augmentation_panel,
    teaching.map_panel,
]


@pytest.mark.parametrize("make", PANELS, ids=lambda make: make.__name__)
def test_a_panel_shows_itself_live_and_still(lab, make, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    bundle, metadata = make(lab)._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert len(bundle["image/png"]) > 1000
    assert metadata["image/png"]["alt"]
    monkeypatch.setenv("IN_TEST", "1")  # as when the notebook's outputs are made
    assert set(make(lab)._repr_mimebundle_()[0]) == {"image/png", "text/plain"}


@pytest.mark.parametrize("make", PANELS, ids=lambda make: make.__name__)
def test_all_html_has_its_own_paper_and_ink(lab, make):
    "Black on transparent cannot be read in the dark theme."
    parts = vars(make(lab).parts)
    shown = [parts[name].value for name in ("output", "message") if name in parts] + [
        card.html.value for card in parts.get("cards", [])
    ]
    for text in shown:
        assert panels._SHEET in text.split(">")[0]
        assert all('alt="' in tag for tag in re.findall("<img[^>]*>", text))


def test_search_by_words_by_an_answer_and_by_an_upload(lab):
    parts = panels.search_panel(lab, "a red car", k=4).parts
    assert len(parts.grid.children) == 4 and "a red car" in parts.message.value
    clicked, kept = parts.cards[1].item["row"], parts.grid.children
    parts.cards[1].button.click()
    assert clicked not in [card.item["row"] for card in parts.cards[:4]]
    assert parts.grid.children == kept  # the same buttons: the keyboard's focus stays
    upload(parts.file, Path(lab.index.path(3)).read_bytes())
    assert parts.cards[0].item["row"] == 3 and "<img" in parts.message.value
    parts.text.value = "a blue boat"
    assert "a blue boat" in parts.message.value and "<img" not in parts.message.value
    parts.count.value = 2
    assert len(parts.grid.children) == 2 and "a blue boat" in parts.message.value


@pytest.mark.parametrize(
    "query, said",
    [
        ("", "empty"),
        ("   ", "empty"),
        ("boat " * 500, "cut off"),
        ("a zebra made of xylophones", "never seen"),
        ("🙂", "knows no part"),
        ("собака на пляже", "knows no part"),
        ("<script>alert(1)</script> dog", "never seen"),
    ],
)
def test_what_is_odd_about_a_query_is_said(lab, query, said):
    parts = panels.search_panel(lab).parts
    parts.text.value = query
    assert said in parts.message.value and "<script" not in parts.message.value
    assert bool(parts.grid.children) != alert(parts.message)  # an error leaves no old answers standing


def test_more_answers_than_pictures(lab):
    parts = panels.search_panel(lab).parts
    parts.count.value = 48
    assert alert(parts.message) and "from 1 to 20" in parts.message.value


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no picture", png()[:40]], ids=["nothing", "zip", "cut"])
def test_an_upload_that_is_no_picture(lab, data):
    searching, sorting = panels.search_panel(lab).parts, panels.zeroshot_panel(lab).parts
    for parts, output in ((searching, searching.message), (sorting, sorting.output)):
        upload(parts.file, data)
        assert alert(output) and "upload a JPEG" in output.value


def test_uploads_of_odd_sizes(lab):
    parts = panels.search_panel(lab).parts
    upload(parts.file, png(1, 1))
    assert "too few to show anything" in parts.message.value and parts.grid.children
    upload(parts.file, png(20_000, 20_000, "1"))
    assert alert(parts.message) and len(parts.message.value) < 1000


def test_the_picture_of_the_slider_and_the_upload(lab):
    parts = panels.zeroshot_panel(lab).parts
    first = parts.output.value
    upload(parts.file, png(40, 30))
    own = parts.output.value
    parts.picture.value = 5
    assert len({first, own, parts.output.value}) == 3
    best, notes = panels._guess(lab, png(40, 30), ["a dog", "a boat"])
    assert math.isclose(sum(p for _, p in best), 1, rel_tol=1e-5) and notes == []


@pytest.mark.parametrize(
    "classes, said",
    [
        ("", "there are no classes"),
        (" ,\n, ", "there are no classes"),
        ("a dog, A  DOG", "are the same"),
        ("🙂, a dog", "never saw any"),
        ("a dog, a grue", "!"),
    ],
)
def test_what_is_odd_about_classes_is_said(lab, classes, said):
    parts = panels.zeroshot_panel(lab).parts
    parts.classes.value = classes
    assert said in parts.output.value


def test_tokens_of_odd_texts(lab):
    parts = teaching.token_panel(lab).parts
    for text, said in (
        ("", "2 tokens"),
        ("boat " * 500, "cut off"),
        ("🙂", "knows no part"),
        ("<b>", "&lt;"),
        ("dog", "3 tokens"),
    ):
        parts.text.value = text
        assert said in parts.output.value and not alert(parts.output)


def test_temperature_sharpens_and_keeps_the_order(lab):
    captions, cosines = teaching._caption_row(lab, 19)  # the row wraps around at the end
    assert captions[0] == lab.index.captions_of(19)[0] and len(captions) == 8
    alike = [teaching._softmax_row(cosines, tau)[1] for tau in (0.01, 0.1, 1, 10)]
    assert alike == sorted(alike) and 1 <= alike[0] and alike[-1] <= 8
    with pytest.raises(LabError, match="above 0"):
        teaching._softmax_row(cosines, float("nan"))


def test_freezing_is_tried_on_a_copy(lab):
    before = [p.requires_grad for p in lab.model.parameters()]
    parts = teaching.freezing_panel(lab).parts
    assert parts.n.disabled
    seen = set()
    for policy in teaching.POLICIES:
        parts.policy.value = policy
        seen.add(parts.output.value)
        assert not alert(parts.output)
    assert len(seen) == len(teaching.POLICIES)
    parts.policy.value, parts.n.value = "last-n", 0
    assert not parts.n.disabled and alert(parts.output) and "whole number from 1" in parts.output.value
    assert [p.requires_grad for p in lab.model.parameters()] == before


def test_augmentation_by_seed_and_kind(lab):
    parts = teaching.augmentation_panel(lab).parts
    drawn = parts.output.value
    for kind in teaching._AUGMENTATIONS:
        getattr(parts, kind).value = False
    assert "augment = none" in parts.output.value
    for kind in teaching._AUGMENTATIONS:
        getattr(parts, kind).value = True
    assert parts.output.value == drawn
    parts.seed.value = 3
    assert parts.output.value != drawn


def test_a_map_that_a_keyboard_can_walk(lab):
    parts = teaching.map_panel(lab, 10).parts
    assert parts.output.value.count('tabindex="0"') == parts.output.value.count("<title>") == 20
    parts.find.value = "a"
    assert "20 of 20 points say" in parts.output.value
    parts.method.value = "tsne"
    assert parts.output.value.count("<title>") == 20
    parts.count.value = 3
    assert parts.output.value.count("<title>") == 6 or alert(parts.output)


def test_what_is_no_lab_error_is_named_too(lab, monkeypatch):
    monkeypatch.setattr(teaching, "_map_points", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in teaching.map_panel(lab).parts.output.value


def test_a_run_opens_as_a_lab(lab, tmp_path, monkeypatch):
    from clip475.models.joint import save_model

    again = panels.open_lab(save_model(lab.model, lab.config, tmp_path / "run"))
    np.testing.assert_allclose(again.index.image_embeddings, lab.index.image_embeddings, atol=1e-5)


def test_the_notebooks_keep_stills_and_no_widgets():
    notebooks = [json.loads(file.read_text(encoding="utf-8")) for file in NOTEBOOKS]
    outputs = [
        o.get("data", {})
        for notebook in notebooks
        for cell in notebook["cells"]
        for o in cell.get("outputs", [])
    ]
    assert not any("widgets" in notebook["metadata"] for notebook in notebooks)
    assert not any("application/vnd.jupyter.widget-view+json" in data for data in outputs), (
        "run with IN_TEST=1, a notebook keeps the stills alone"
    )
    assert sum("image/png" in data for data in outputs) == len(PANELS)
