"Towers and data as people have them: each is read as it was meant, or refused in one sentence."

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from clip475.app.report import _in_two_splits, _in_two_splits_text
from clip475.core.config import LabConfig
from clip475.core.devices import autocast_dtype
from clip475.core.figures import save_figure, show_images
from clip475.core.files import LabError
from clip475.data.layouts import _LAYOUTS, _detect_layout, read_splits
from clip475.data.lists import _Options
from clip475.data.photos import load_photos
from clip475.data.tokens import _builtin_text_folder, load_tokenizer
from clip475.models.text import encode_texts, load_text_encoder
from clip475.training.batches import prepare_data

pytestmark = pytest.mark.usefixtures("one_thread")
END = 49_407


def refusal(function, *args, **options):
    with pytest.raises(LabError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900, message
    return message


# ── text towers ──


@pytest.fixture(scope="module")
def clip_tower(tmp_path_factory):
    "A small CLIP text tower with CLIP's tokenizer, as save_pretrained writes it."
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(475)
    shape = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=24
    )
    tower = CLIPTextModelWithProjection(shape)
    tower.text_model.embeddings.token_embedding.weight.data.normal_()
    tower.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_builtin_text_folder() / name, folder)
    return folder


def with_end(folder, to, eos):
    "A copy of the tower whose config.json says that captions end at token `eos`."
    shutil.copytree(folder, to)
    about = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**about, "eos_token_id": eos}))
    return LabConfig.from_preset("tiny", text_model=str(to))


def test_a_tower_that_reads_at_another_token_than_its_tokenizer_ends_with(clip_tower, tmp_path):
    captions = ["a dog in the snow", "two boats", "a dog"]
    encoders = [load_text_encoder(with_end(clip_tower, tmp_path / str(eos), eos)) for eos in (END, 2)]
    tokenizer = load_tokenizer(str(clip_tower))
    right, legacy = (encode_texts(captions, encoder, tokenizer) for encoder in encoders)
    assert torch.equal(right, legacy)  # 2 is how CLIP's own files said it before 2023
    for eos in (0, None, 49_406):
        message = refusal(load_text_encoder, with_end(clip_tower, tmp_path / f"bad {eos}", eos))
        assert f"token {eos!r}" in message and "write 49407 in config.json" in message


def test_the_legacy_end_token_with_added_tokens(clip_tower, tmp_path):
    folder = tmp_path / "added"
    config = with_end(clip_tower, folder, 2)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(folder)
    tower = CLIPTextModelWithProjection.from_pretrained(folder)
    tower.resize_token_embeddings(END + 2)
    tower.save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "eos_token_id": 2}))
    captions = ["a <cat-toy> in the snow", "a <cat-toy> on a boat at night"]
    one, other = encode_texts(captions, load_text_encoder(config), load_tokenizer(str(folder)))
    assert one @ other < 0.999  # both would be read at the added token, which sees “a” alone


def test_a_tower_that_gives_all_captions_one_embedding_is_refused(clip_tower, tmp_path):
    config = with_end(clip_tower, tmp_path / "same", END)
    tower = CLIPTextModelWithProjection.from_pretrained(config.text_model)
    tower.text_model.embeddings.token_embedding.weight.data.zero_()
    tower.text_model.embeddings.position_embedding.weight.data.zero_()
    tower.save_pretrained(config.text_model)
    assert "the same embedding" in refusal(load_text_encoder, config)


def test_a_caption_that_spells_out_the_end_token_does_not_end_there():
    config, tokenizer = LabConfig.from_preset("tiny"), load_tokenizer()
    captions = ["a dog <|endoftext|> and a red boat", "a dog <|endoftext|> and two cats", "a dog"]
    embeddings = encode_texts(captions, load_text_encoder(config), tokenizer)
    assert (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.999


def test_fp16_on_a_cpu_computes_as_auto_does_and_says_so(capsys):
    automatic, cpu = LabConfig.from_preset("tiny"), torch.device("cpu")
    for _ in range(2):
        chosen = autocast_dtype(automatic.replace(precision="fp16"), cpu)
        assert chosen == autocast_dtype(automatic, cpu)
    assert capsys.readouterr().err.count("fp16 takes many times as long on a CPU") == 1
    assert autocast_dtype(automatic.replace(precision="fp16"), torch.device("cuda")) == torch.float16


# ── figures ──


def test_characters_that_no_font_has_are_named(tmp_path, capsys, recwarn):
    figure = show_images([np.zeros((8, 8, 3), np.uint8)], ["a cat: \U00012031, as seen in Ur"])
    save_figure(figure, tmp_path / "cuneiform.png")
    note = capsys.readouterr().err
    assert note.count("\U00012031") == 1 and "drawn as boxes" in note and not recwarn.list


# ── lists, shards and texts ──

NAMES = [f"{i:03}.png" for i in range(6)]


def draw(folder, names=NAMES):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * int(Path(name).stem), 99, 0)).save(folder / name)


def png(name):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * int(Path(name).stem), 99, 0)).save(data, "PNG")
    return data.getvalue()


def words(name, k=0):
    return f"picture {Path(name).stem}, as {k} wrote it"


TRUTH = {name: [words(name)] for name in NAMES}


def pools(root, **options):
    return _LAYOUTS[_detect_layout(root, _Options(**options))].read(root, _Options(**options))


def captions_in(root, **options):
    "The captions of each picture, told by its colour and not by its name."
    found = {}
    for pool in pools(root, **options).values():
        for row, path in enumerate(pool.image_paths):
            with Image.open(path) as image:
                found[NAMES[image.getpixel((0, 0))[0] // 40]] = pool.captions_of(row)
    return found


def write_rows(file, header, rows, separator=","):
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=separator).writerows([header, *rows])


THIRD_COLUMN = {
    ("image", "caption", "id"): lambda name, k: (name, words(name, k), k),
    ("image", "id", "caption"): lambda name, k: (name, k, words(name, k)),
    ("image_name", "comment_number", "comment"): lambda name, k: (name, k, words(name, k)),
    ("image", "split", "caption"): lambda name, k: (name, "train", words(name, k)),
}


@pytest.mark.parametrize("header", THIRD_COLUMN)
def test_a_captions_txt_with_a_third_column(tmp_path, header, capsys):
    draw(tmp_path / "Images")
    rows = [THIRD_COLUMN[header](name, k) for name in NAMES for k in range(2)]
    write_rows(tmp_path / "captions.txt", header, rows)
    assert captions_in(tmp_path) == {name: [words(name, 0), words(name, 1)] for name in NAMES}
    assert "split" in header or f"image from {header[0]}" in capsys.readouterr().err
    if header[1] != "caption":  # without its header the second column would be part of the caption
        write_rows(tmp_path / "captions.txt", rows[0], rows[1:])
        assert "it has no header" in refusal(pools, tmp_path)


def test_an_unknown_header_of_a_captions_txt_is_refused_and_can_be_named(tmp_path):
    draw(tmp_path)
    write_rows(tmp_path / "captions.txt", ("what", "said"), [(name, words(name)) for name in NAMES])
    message = refusal(pools, tmp_path)
    assert "what, said" in message and "--image-column and --caption-column" in message
    assert captions_in(tmp_path, image_column="What", caption_column="said") == TRUTH


def test_the_columns_of_the_configuration_are_those_of_a_list(tmp_path):
    draw(tmp_path)
    rows = [(f"wrong-{name}", name, words(name), "a title") for name in NAMES]
    write_rows(tmp_path / "mine.csv", ("file_name", "where", "caption", "title"), rows)
    message = refusal(pools, tmp_path, image_column="where")
    assert "line 2" in message and "caption and title" in message and "--caption-column" in message
    config = LabConfig.from_preset(
        "tiny", train_images=4, val_images=2, image_column="where", caption_column="caption"
    )
    for split in read_splits(tmp_path, config):
        assert all(split.captions_of(row) == TRUTH[path.name] for row, path in enumerate(split.image_paths))


def test_kaggles_flickr30k_with_its_broken_row(tmp_path, capsys):
    folder = tmp_path / "flickr30k_images"
    draw(folder / "flickr30k_images")
    lines = [f'{name}| {k}| {words(name, k)} , "so to say" .' for name in NAMES for k in range(2)]
    lines[3] = f"{NAMES[1]}| 1   A dog runs across the grass ."
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *lines]))
    message = refusal(pools, folder)
    assert "results.csv: line 5 has fewer fields" in message and "--on-bad replace" in message
    found = captions_in(folder, skip=True)
    assert [len(captions) for captions in found.values()] == [2, 1, 2, 2, 2, 2]
    assert found[NAMES[0]][1] == f'{words(NAMES[0], 1)} , "so to say" .'
    assert "1 of its lines are left out" in capsys.readouterr().err


def test_flickr30ks_token_file(tmp_path):
    draw(tmp_path / "flickr30k-images")
    text = "".join(f"{name}#{k}\t{words(name, k)}\n" for name in NAMES for k in range(2))
    (tmp_path / "results_20130124.token").write_text(text)
    assert captions_in(tmp_path) == {name: [words(name, 0), words(name, 1)] for name in NAMES}


@pytest.mark.parametrize("file", ["dataset.json", "dataset_flickr30k.json", "my_copy.json"])
def test_karpathys_file_under_any_name(tmp_path, file):
    draw(tmp_path / "flickr30k-images")
    splits = ["train", "train", "train", "restval", "val", "test"]
    images = [
        {"sentids": [i], "imgid": i, "sentences": [{"raw": words(name)}], "split": split, "filename": name}
        for i, (name, split) in enumerate(zip(NAMES, splits, strict=True))
    ]
    (tmp_path / file).write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    assert captions_in(tmp_path) == TRUTH
    assert {name: len(pool) for name, pool in pools(tmp_path).items()} == {"train": 4, "val": 1, "test": 1}
    shutil.copy(tmp_path / file, tmp_path / "dataset_coco.json")
    assert "keep the one whose pictures are here" in refusal(pools, tmp_path) or file == "dataset_coco.json"


def test_coco_2017(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split, names in {"train": NAMES[:4], "val": NAMES[4:]}.items():
        draw(tmp_path / f"{split}2017", names)
        images = [{"id": int(Path(name).stem), "file_name": name} for name in names]
        annotations = [
            {"id": image["id"], "image_id": image["id"], "caption": words(image["file_name"])}
            for image in images
        ]
        file = tmp_path / "annotations" / f"captions_{split}2017.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert _detect_layout(tmp_path) == "coco" and captions_in(tmp_path) == TRUTH
    assert [len(pool) for pool in pools(tmp_path).values()] == [4, 2]
    file.unlink()
    message = refusal(pools, tmp_path)
    assert "captions_val2017.json" in message and "trainval2017.zip" in message


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("header", [("filepath", "title"), ("Image Path", "Text"), ("img", "sentence")])
def test_tables(tmp_path, separator, encoding, header):
    draw(tmp_path / "pictures")
    lines = [header, *((f"pictures/{name}", f"{words(name)}: “é”") for name in NAMES)]
    quote = "" if separator == "|" else '"'
    text = "\r\n".join(separator.join(f"{quote}{cell}{quote}" for cell in line) for line in lines)
    mark = f"sep={separator}\r\n" if separator == ";" else ""  # as Excel writes it
    (tmp_path / "list.csv").write_bytes(f"{mark}{text}\r\n".encode(encoding))
    assert captions_in(tmp_path) == {name: [f"{words(name)}: “é”"] for name in NAMES}


def test_captions_that_are_a_list_inside_a_table(tmp_path):
    draw(tmp_path)
    rows = [(json.dumps([words(name), "another"]), "train", name) for name in NAMES]
    write_rows(tmp_path / "flickr_annotations_30k.csv", ("raw", "split", "filename"), rows)
    assert captions_in(tmp_path) == {name: [words(name), "another"] for name in NAMES}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_imagefolder_of_hugging_face_with_its_splits(tmp_path, kind, column):
    for word, names in {"train": NAMES[:3], "validation": NAMES[3:5], "test": NAMES[5:]}.items():
        draw(tmp_path / word, names)
        if kind == "csv":
            rows = [(name, words(name)) for name in names]
            write_rows(tmp_path / word / "metadata.csv", ("file_name", column), rows)
        else:
            lines = [json.dumps({"file_name": name, column: words(name)}) + "\n" for name in names]
            (tmp_path / word / "metadata.jsonl").write_text("".join(lines))
    assert captions_in(tmp_path) == TRUTH
    assert {name: len(pool) for name, pool in pools(tmp_path).items()} == {"train": 3, "val": 2, "test": 1}


def test_one_list_whose_pictures_lie_in_folders_for_splits(tmp_path):
    names = [f"{word}/{name}" for word, name in zip(["train"] * 4 + ["test"] * 2, NAMES, strict=True)]
    draw(tmp_path, names)
    write_rows(tmp_path / "metadata.csv", ("file_name", "text"), [(name, words(name)) for name in names])
    assert captions_in(tmp_path) == TRUTH
    assert {name: len(pool) for name, pool in pools(tmp_path).items()} == {"train": 4, "test": 2}


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tar(file, names, more=(), text=".txt"):
    with tarfile.open(file, "w") as tar:
        for name in names:
            about = json.dumps({"caption": words(name)}) if text == ".json" else words(name)
            parts = {name: png(name), f"{Path(name).stem}{text}": about.encode(), **dict(more)}
            for member, data in parts.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("text", [".txt", ".json"])
def test_webdataset_shards_keep_pairs_and_splits(tmp_path, cache_folder, text):
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "train-00000.tar", NAMES[:2], text=text)
    write_tar(root / "train-00001.tar", NAMES[2:4], text=text)
    write_tar(root / "val-00000.tar", NAMES[4:], text=text)
    (root / "train-00000.parquet").write_bytes(b"img2dataset's own table")
    assert _detect_layout(root) == "webdataset" and captions_in(root) == TRUTH
    assert {name: len(pool) for name, pool in pools(root).items()} == {"train": 4, "val": 2}
    before = read_splits(root, LabConfig.from_preset("tiny", train_images=3, val_images=2))
    moved = root.rename(tmp_path / "moved")
    assert read_splits(moved, LabConfig.from_preset("tiny", train_images=3, val_images=2)) == before


def test_shards_as_webdataset_writes_them(tmp_path, cache_folder):
    webdataset = pytest.importorskip("webdataset")
    root = tmp_path / "shards"
    root.mkdir()
    with webdataset.TarWriter(str(root / "00000.tar")) as tar:
        for name in NAMES:
            key = f"a/{Path(name).stem}"
            tar.write({"__key__": key, "png": png(name), "txt": words(name), "json": {"caption": "other"}})
    assert captions_in(root) == TRUTH


@pytest.mark.parametrize(
    "more, says",
    [
        ({"../../evil.png": b"x", "../../evil.txt": b"x"}, "below the folder"),
        ({"9.png": png("0.png"), "9.txt": b"\xff\xfe\xfa"}, "no UTF-8"),
        ({"9.png": png("0.png"), "9.txt": b" \n "}, None),
    ],
)
def test_shards_that_are_damaged_or_hostile_leave_nothing(tmp_path, cache_folder, more, says, capsys):
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "0.tar", NAMES[:1], more)
    if says:
        assert says in refusal(pools, root) and not list((cache_folder / "unpacked").iterdir())
    else:
        assert len(captions_in(root)) == 1 and "no caption" in capsys.readouterr().err
    (root / "1.tar").write_bytes((root / "0.tar").read_bytes()[:700])
    assert "1.tar" in refusal(pools, root) or says


@pytest.mark.parametrize("many", [False, True])
def test_parquet_files_of_the_hub(tmp_path, cache_folder, many):
    import pyarrow
    import pyarrow.parquet

    root = tmp_path / "parquet"
    (root / "data").mkdir(parents=True)
    for word, names in {"train": NAMES[:4], "validation": NAMES[4:]}.items():
        images = [{"bytes": png(name), "path": f"there/{name}" if many else None} for name in names]
        texts = [[words(name), "another"] if many else words(name) for name in names]
        table = pyarrow.table({"image": images, "caption": texts, "id": list(range(len(names)))})
        pyarrow.parquet.write_table(table, root / "data" / f"{word}-00000-of-00001.parquet")
    assert captions_in(root) == {name: [words(name)] + ["another"] * many for name in NAMES}
    assert {name: len(pool) for name, pool in pools(root).items()} == {"train": 4, "val": 2}
    table = pyarrow.table({"url": ["http://x/1.jpg"], "text": ["a cat"]})
    (root / "data" / "a.parquet").unlink(missing_ok=True)
    pyarrow.parquet.write_table(table, root / "data" / "train-00000-of-00001.parquet")
    message = refusal(pools, root)
    assert "url, text" in message and "img2dataset" in message


def test_a_text_beside_each_picture(tmp_path, capsys):
    names = [f"{word}/{name}" for word, name in zip(["train"] * 4 + ["val"] * 2, NAMES, strict=True)]
    draw(tmp_path, names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f"{words(name)}\n\n")
    assert _detect_layout(tmp_path) == "texts" and captions_in(tmp_path) == TRUTH
    assert {name: len(pool) for name, pool in pools(tmp_path).items()} == {"train": 4, "val": 2}
    (tmp_path / names[0]).with_suffix(".txt").unlink()
    assert len(captions_in(tmp_path)) == 5 and "1 pictures have no .txt" in capsys.readouterr().err
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("0 0.51 0.5 0.25 0.3\n")
    assert "numbers alone" in refusal(pools, tmp_path)


def test_fiftyones_samples_and_table(tmp_path):
    root = tmp_path / "export"
    draw(root / "data")
    label = {"_cls": "Classification", "label": "unused"}
    samples = [
        {"filepath": f"data/{name}", "tags": ["mine", "train" if i < 4 else "validation"], "caption": caption}
        for i, (name, caption) in enumerate(
            (name, words(name) if name != NAMES[0] else {**label, "label": words(name)}) for name in NAMES
        )
    ]
    (root / "samples.json").write_text(json.dumps({"samples": samples}))
    assert captions_in(root) == TRUTH
    assert {name: len(pool) for name, pool in pools(root).items()} == {"train": 4, "val": 2}
    (root / "samples.json").unlink()
    rows = [(f"{root}/data/{name}", words(name), "[]") for name in NAMES]
    write_rows(root / "labels.csv", ("filepath", "caption", "tags"), rows)
    assert captions_in(root) == TRUTH


def test_fiftyones_classes_are_named_in_one_short_sentence(tmp_path):
    labels = {f"{i:06}": i % 3 for i in range(20_000)}
    (tmp_path / "labels.json").write_text(json.dumps({"classes": ["a", "b", "c"], "labels": labels}))
    assert "one for each of 20,000 pictures" in refusal(pools, tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"a.jpg": labels}))
    assert len(refusal(pools, tmp_path)) < 400


@pytest.mark.parametrize(
    "file, content, says",
    [
        (
            "list.csv",
            "a;b\n1;2\n".encode("utf-16"),
            "encoding: utf-16) has the columns a, b (separator: semicolon)",
        ),
        ("list.tsv", b"url\twords\nx\ty\n", "has the columns url, words (separator: tab)"),
        ("list.jsonl", b'{"url": "x", "words": "y"}\n', "has the columns url, words"),
        ("list.xlsx", b"PK", "save its sheet as CSV"),
        ("all.zip", b"PK", "unpack it here"),
        ("captions.pkl", b"\x80", "could run code"),
    ],
)
def test_what_is_not_read_is_said_with_what_it_looks_like(tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    message = refusal(_detect_layout, tmp_path)
    assert file in message and says in message


def test_two_folders_with_pictures_of_the_same_names_are_refused(tmp_path):
    for folder in ("small", "large"):
        draw(tmp_path / folder)
    write_rows(tmp_path / "list.csv", ("file_name", "caption"), [(name, words(name)) for name in NAMES])
    assert "large and small hold pictures of the same names" in refusal(pools, tmp_path)


# ── copies in two splits ──


def saved_again(folder, photo, name):
    "A photograph in another size, quality and format."
    with Image.open(photo.path) as image:
        image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(folder / name, quality=70)


def test_copies_in_two_splits_are_reported_or_replaced(tmp_path, cache_folder):
    root = tmp_path / "data"
    root.mkdir()
    photos, rows = load_photos()[:30], []
    for i, photo in enumerate(photos):
        split = "train" if i < 20 else "val"
        shutil.copy(photo.path, root / f"{i:03}.jpg")
        rows.append((f"{i:03}.jpg", photo.captions[0], split))
    saved_again(root, photos[3], "alike.jpg")
    shutil.copy(photos[25].path, root / "same.jpg")
    rows += [("alike.jpg", "in val", "val"), ("same.jpg", "in train", "train")]
    write_rows(root / "list.csv", ("file_name", "caption", "split"), rows)
    config = LabConfig.from_preset("tiny", data=str(root), train_images=None, val_images=None)
    prepared = prepare_data(config, progress=False)
    found = _in_two_splits(prepared, config)
    assert found["in_two_splits"] == [["train: same.jpg", "val: 025.jpg"]]
    assert found["alike_in_two_splits"] == [["train: 003.jpg", "val: alike.jpg"]]
    assert "1 picture is in two splits, alike to the eye" in _in_two_splits_text(found)
    mended = prepare_data(config.replace(on_copies="replace"), progress=False)
    assert _in_two_splits_text(_in_two_splits(mended, config)) == ""
    assert [len(split) for split in mended] == [19, 11] and len(mended[0].bad) == 2
    assert {name: reason for _, name, reason in mended[0].bad} == {
        "same.jpg": "it is in val too, as 025.jpg",
        "003.jpg": "it is in val too, as alike.jpg",
    }
