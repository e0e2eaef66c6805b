"Five layouts: a picture always keeps its own captions, and no picture is in two splits."

import csv
import io
import json
import os
import random
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import finished

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.captions import _load_splits, load_split
from clip475.data.layouts import _LAYOUTS, _detect_layout, read_splits
from clip475.data.splits import _SPLIT_FILE, _deal, _split_record, check_disjoint

COCO = Path(__file__).parents[1].parent / "shared" / "data" / "coco2014"
MAIN = Path(__file__).parents[1]


# the same pictures and words, written in every layout; the colour of a picture tells its id


def colour_of(id):
    return (id * 37 % 256, id * 91 % 256, id * 151 % 256)


COLOURS = np.array([colour_of(id) for id in range(200)])


@cache
def jpeg(id):
    b = io.BytesIO()
    Image.new("RGB", (16, 16), colour_of(id)).save(b, "JPEG", quality=95)
    return b.getvalue()


def words(id, k):
    return f'image {id:03}, as seen by {k}, "so to say", and no other'


def truth(ids, captions=2):
    return {id: [words(id, k) for k in range(captions + id % 2)] for id in ids}


def name_of(id):
    return f"{id:03}.jpg"


def write_json(file, value):
    file.write_text(json.dumps(value))


def put(folder, ids, name=name_of):
    for id in ids:
        (folder / name(id)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name(id)).write_bytes(jpeg(id))


def coco_json(said, name=name_of):
    return {
        "images": [{"id": id, "file_name": name(id)} for id in said],
        "annotations": [
            {"id": 10 * id + k, "image_id": id, "caption": c}
            for id, cs in said.items()
            for k, c in enumerate(cs)
        ],
    }


def split_words(ids, all):
    "The split of each id in a layout that has splits of its own."
    return {id: all[i % len(all)] for i, id in enumerate(sorted(ids))}


def write_csv(file, header, rows):
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def in_coco(root, said):
    (root / "annotations").mkdir()
    ids = sorted(said)
    for name, some in (("train", ids[::2]), ("val", ids[1::2])):
        put(root / f"{name}2014", some)
        write_json(
            root / "annotations" / f"captions_{name}2014.json", coco_json({id: said[id] for id in some})
        )


def in_karpathy(root, said):
    split = split_words(said, ["train", "restval", "val", "train", "test", "val"])
    put(root / "val2014", said)
    write_json(
        root / "dataset_coco.json",
        {
            "dataset": "coco",
            "images": [
                {
                    "filepath": "val2014",
                    "filename": name_of(id),
                    "imgid": id + 7,
                    "cocoid": id,
                    "split": split[id],
                    "sentences": [{"raw": c} for c in said[id]],
                }
                for id in said
            ],
        },
    )


def in_fiftyone(root, said):
    put(root / "data", said)
    write_json(root / "labels.json", coco_json(said))


def in_fiftyone_splits(root, said):
    split = split_words(said, ["train", "validation", "train", "test"])
    for word in ("train", "validation", "test"):
        some = [id for id in said if split[id] == word]
        put(root / word / "data", some)
        write_json(
            root / word / "labels.json",
            {
                "images": [{"id": i, "file_name": name_of(id)} for i, id in enumerate(some, 1)],
                "annotations": [
                    {"id": 10 * i + k, "image_id": i, "caption": c}
                    for i, id in enumerate(some, 1)
                    for k, c in enumerate(said[id])
                ],
            },
        )


def in_dictionary(root, said):
    put(root / "images", said)
    write_json(root / "captions.json", {name_of(id): cs for id, cs in said.items()})


def in_entries(root, said):
    put(root / "images", said)
    write_json(
        root / "captions.json",
        [{"image": f"images/{name_of(id)}", "caption": c} for id, cs in said.items() for c in cs],
    )


def in_flickr(root, said):
    put(root / "Images", said)
    (root / "captions.txt").write_text(
        "image,caption\n" + "".join(f"{name_of(id)},{c}\n" for id, cs in said.items() for c in cs)
    )


def in_old_flickr(root, said):
    split = split_words(said, ["train", "dev", "train", "test"])
    put(root / "Flicker8k_Dataset", said)
    (root / "Flickr8k_text").mkdir()
    (root / "Flickr8k_text" / "Flickr8k.token.txt").write_text(
        "".join(f"{name_of(id)}#{k}\t{c}\n" for id, cs in said.items() for k, c in enumerate(cs))
    )
    for word in ("train", "dev", "test"):
        (root / "Flickr8k_text" / f"Flickr_8k.{word}Images.txt").write_text(
            "".join(f"{name_of(id)}\n" for id in said if split[id] == word)
        )


def in_csv(root, said):
    put(root, said, deep)
    write_csv(
        root / "mine.csv", ["caption", "file_name"], [(c, deep(id)) for id, cs in said.items() for c in cs]
    )


def in_full_csv(root, said):
    split = split_words(said, ["train", "val", "test", "train"])
    put(root, said, deep)
    write_csv(
        root / "mine.csv",
        ["file_name", "caption", "split", "image_id"],
        [(deep(id), c, split[id], id) for id, cs in said.items() for c in cs],
    )


def deep(id):
    return f"{'even' if id % 2 == 0 else 'odd/one'}/{name_of(id)}"


WRITERS = {
    "coco": in_coco,
    "karpathy": in_karpathy,
    "fiftyone": in_fiftyone,
    "fiftyone splits": in_fiftyone_splits,
    "fiftyone dictionary": in_dictionary,
    "fiftyone entries": in_entries,
    "flickr8k": in_flickr,
    "flickr8k old": in_old_flickr,
    "csv": in_csv,
    "csv full": in_full_csv,
}


def write_layout(root, layout, said):
    root.mkdir(parents=True)
    WRITERS[layout](root, said)
    return root


def config(train=4, val=2, test=2, **changes):
    return LabConfig.from_preset("tiny", train_images=train, val_images=val, test_images=test, **changes)


def refusal(fn, *args, **kwargs):
    with pytest.raises(LabError) as caught:
        fn(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 900
    return message


def id_of(path):
    "Which image these pixels are."
    with Image.open(path) as image:
        colour = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return int(np.abs(COLOURS - colour).max(1).argmin())


def check(splits, said, whole=True):
    "Pixels and words agree; no image, file or picture is in two splits. `whole`: no caption was cut or lost."
    seen = [id_of(path) for split in splits for path in split.image_paths]
    assert (
        len(set(seen))
        == len(seen)
        == sum(map(len, splits))
        == len({p for s in splits for p in s.image_paths})
        == len({i for s in splits for i in s.image_ids.tolist()})
    )
    for split in splits:
        for row, path in enumerate(split.image_paths):
            own = said[id_of(path)]
            if whole:
                assert sorted(split.captions_of(row)) == sorted(own)
            else:
                assert all(any(c.startswith(one) for c in own) for one in split.captions_of(row))


# every layout, read whole


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_pairs_and_disjoint_splits(tmp_path, layout, capfd):
    said = truth(range(20, 44))
    root = write_layout(tmp_path / "data", layout, said)
    assert _detect_layout(root) == layout.split()[0]
    splits = read_splits(root, config())
    assert [(s.name, len(s)) for s in splits] == [("train", 4), ("val", 2), ("test", 2)]
    check(splits, said)
    assert read_splits(root, config(test=0)) == splits[:2] or layout == "karpathy"
    for seed in range(5):
        check(read_splits(root, config(seed=seed)), said)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", WRITERS)
def test_none_takes_all_that_others_leave(tmp_path, layout):
    said = truth(range(20, 44))
    splits = read_splits(write_layout(tmp_path / "data", layout, said), config(None, 2, 2))
    check(splits, said)
    assert [len(s) for s in splits][1:] == [2, 2] and len(splits[0]) >= 12


@pytest.mark.parametrize("layout", WRITERS)
def test_the_order_in_files_and_a_missing_picture_change_nothing_else(tmp_path, layout):
    said = truth(range(20, 44))
    plain = read_splits(write_layout(tmp_path / "a", layout, said), config())
    turned = dict(sorted(said.items(), key=lambda item: item[0] * 7 % 24))
    other = write_layout(tmp_path / "b", layout, turned)
    assert [s.fingerprint for s in read_splits(other, config())] == [s.fingerprint for s in plain]
    for split in read_splits(other, config(None, 2, 2))[0].image_paths[:1]:
        split.unlink()
    after = read_splits(other, config())
    check(after, said)
    assert sum(s.missing for s in after) >= 1


@pytest.mark.parametrize("layout", WRITERS)
def test_excluded_images_are_replaced_and_the_others_stay(tmp_path, layout):
    said = truth(range(20, 56))
    root = write_layout(tmp_path / "data", layout, said)
    before = read_splits(root, config(4, 2, 1))
    exclude = {s.name: {int(s.image_ids[0])} for s in before}
    after = read_splits(root, config(4, 2, 1), exclude)
    for old, new in zip(before, after):
        assert len(old) == len(new) and set(old.image_ids) - set(new.image_ids) == exclude[old.name]
    check(after, said)


FINGERPRINTS = """
import sys
from clip475.core.config import LabConfig
from clip475.data.layouts import read_splits
from clip475.data.splits import _split_record
config = LabConfig.from_preset("tiny", train_images=4, val_images=2, test_images=2)
print(*[_split_record(read_splits(root, config), config)["fingerprint"] for root in sys.argv[1:]])
"""


def test_fingerprints_are_the_same_on_every_machine(tmp_path):
    said, here, there = truth(range(20, 44)), [], []
    for layout in WRITERS:
        here.append(write_layout(tmp_path / "here" / layout.replace(" ", "_"), layout, said))
        there.append(
            write_layout(
                tmp_path / "somewhere" / "else" / layout.replace(" ", "-"),
                layout,
                dict(reversed(said.items())),
            )
        )
    env = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(MAIN), "OMP_NUM_THREADS": "1"}
    run = finished([sys.executable, "-c", FINGERPRINTS, *map(str, there)], env=env, cwd=tmp_path)
    mine = [_split_record(read_splits(root, config()), config())["fingerprint"] for root in here]
    assert run.stdout.split() == mine and len(set(mine)) > 5


# whatever happens to it


def damage_lines(file, rng):
    lines = file.read_text().split("\n")
    head, rest = lines[:1], lines[1:]
    at = rng.randrange(len(rest)) if rest else 0
    what = rng.choice(["shuffle", "delete", "double", "cut", "blank", "no header"])
    if what == "shuffle":
        rng.shuffle(rest)
    if what == "delete" and rest:
        rest.pop(at)
    if what == "double" and rest:
        rest.insert(rng.randrange(len(rest)), rest[at])
    if what == "blank" and rest:
        rest[at] = rest[at].split(",")[0].split("\t")[0]
    if what == "no header":
        head = []
    text = "\n".join(head + rest)
    file.write_text(text[: rng.randrange(len(text) + 1)] if what == "cut" else text)


def lists_in(data):
    found = [data] if isinstance(data, list) else []
    for value in data.values() if isinstance(data, dict) else []:
        found += [value] if isinstance(value, list) else []
    return [entries for entries in found if entries]


def damage_json(file, rng):
    try:
        data = json.loads(file.read_text())
    except ValueError:
        return
    what, lists = rng.choice(["shuffle", "delete", "double", "cut", "lose", "nonsense"]), lists_in(data)
    if not lists:
        return
    entries = rng.choice(lists)
    at = rng.randrange(len(entries))
    if what == "shuffle":
        rng.shuffle(entries)
    if what == "delete":
        entries.pop(at)
    if what == "double":
        entries.append(entries[at])
    if what in ("lose", "nonsense") and isinstance(entries[at], dict) and entries[at]:
        key = rng.choice(sorted(entries[at]))
        if what == "lose":
            entries[at].pop(key)
        else:
            entries[at][key] = rng.choice([None, -1, 10**7, "", " ", [], {}, "../../x.jpg", 1.5, True])
    text = json.dumps(data)
    file.write_text(text[: rng.randrange(len(text))] if what == "cut" else text)


def damage(root, rng):
    files = sorted(
        p for p in root.rglob("*") if p.suffix in (".json", ".txt", ".csv") and p.name != _SPLIT_FILE
    )
    pictures = sorted(root.rglob("*.jpg"))
    what = rng.choice(["words", "words", "delete", "extra", "empty folder"])
    if what == "words":
        (lambda file: damage_json(file, rng) if file.suffix == ".json" else damage_lines(file, rng))(
            rng.choice(files)
        )
    if what == "delete" and pictures:
        rng.choice(pictures).unlink()
    if what == "extra" and pictures:
        (rng.choice(pictures).parent / f"extra{rng.random()}.jpg").write_bytes(jpeg(199))
    if what == "empty folder":
        (root / rng.choice(["train", "images", "data", "Images", "test"])).mkdir(exist_ok=True)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from(sorted(WRITERS)),
    steps=st.integers(0, 4),
    seed=st.integers(0, 10**6),
    counts=st.sampled_from([(4, 2, 2), (2, 1, 0), (None, 1, 1), (1, None, 1)]),
    record=st.booleans(),
)
def test_no_damage_ever_mixes_up_pairs_or_splits(layout, steps, seed, counts, record):
    rng = random.Random(seed)
    said = truth(rng.sample(range(1, 120), 16), rng.randint(1, 2))
    with tempfile.TemporaryDirectory() as folder:
        root = write_layout(Path(folder) / "data", layout, said)
        chosen = config(*counts, seed=rng.randrange(5))
        before = read_splits(root, chosen)
        check(before, said)
        if record:
            write_json(root / _SPLIT_FILE, _split_record(before, chosen))
        for _ in range(steps):
            damage(root, rng)
        try:
            after = read_splits(root, chosen)
        except LabError as error:
            assert steps and str(root) in str(error) and "\n" not in str(error)
            return
        check(after, said, whole=False)
        if record:
            assert [s.fingerprint for s in after] == [s.fingerprint for s in before]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_dealing(data, n, seed):
    counts, left = {}, n
    for name in data.draw(st.permutations(["val", "train", "test"])):
        counts[name] = data.draw(st.integers(0, left))
        left -= counts[name]
    counts = {name: counts[name] for name in ("val", "train", "test")}
    parts = _deal(range(n), counts, seed)
    assert [len(parts[s]) for s in counts] == list(counts.values())
    every = np.concatenate(list(parts.values()))
    assert len(set(every)) == len(every) and set(every) <= set(range(n))
    bad = set(data.draw(st.lists(st.integers(0, n - 1), max_size=left)))
    mended = _deal(range(n), counts, seed, bad)
    for name in counts:
        assert len(mended[name]) == counts[name] and set(parts[name]) - bad <= set(mended[name])
    assert not bad & set(np.concatenate(list(mended.values())))


# what a layout may look like


def test_the_official_layout_is_cocos_reader(tmp_path):
    root = write_layout(tmp_path / "data", "coco", truth(range(20, 60)))
    assert read_splits(root, config(6, 5, 0)) == _load_splits(root, config(6, 5, 0))
    assert read_splits(root, config(6, 5, 3))[:2] == _load_splits(root, config(6, 5, 0))
    bad = {int(load_split(root, "val", 5).image_ids[2])}
    assert read_splits(root, config(6, 5, 0), {"val": bad})[1] == load_split(root, "val", 5, exclude=bad)


def test_karpathys_test_images(tmp_path):
    said = truth(range(20, 60))
    root = write_layout(tmp_path / "data", "coco", said)
    plain = read_splits(root, config(6, 5, 0))
    val = load_split(root, "val")
    his = val.image_ids[4:12].tolist()
    write_json(
        root / "dataset_coco.json",
        {
            "images": [
                {
                    "filepath": "val2014",
                    "filename": name_of(id),
                    "cocoid": id,
                    "split": "test" if id in his else "restval",
                    "sentences": [{"raw": "x"}],
                }
                for id in val.image_ids.tolist()
            ]
        },
    )
    assert _detect_layout(root) == "coco" and read_splits(root, config(6, 5, 0)) == plain
    for test in (3, 8, None):
        splits = read_splits(root, config(6, 5, test))
        assert (
            set(splits[2].image_ids) <= set(his)
            and not set(splits[1].image_ids) & set(his)
            and len(splits[2]) == (test or 8)
        )
        check(splits, said)
    splits = read_splits(root, config(6, 5, 9))  # not so many of his are there
    assert splits[:2] == plain and len(splits[2]) == 9


def test_flickr_oddities(tmp_path):
    root = write_layout(tmp_path / "data", "flickr8k", truth([1]))
    put(root / "Images", [2, 3])
    (root / "captions.txt").write_text(
        '\ufeffimage,caption\r\n001.jpg,"A sign, ""stop"" , red ."\r\n'
        "002.jpg,A dog , a cat , both asleep .\r\n\r\n"
        '003.jpg,"Hello" says a man, "bye" she said "\r\n'
        '002.jpg,"unfinished\r\nghost.jpg.1,nobody\r\n',
        encoding="utf-8",
    )
    train = _LAYOUTS["flickr8k"].read(root)["all"]
    assert {p.name: train.captions_of(r) for r, p in enumerate(train.image_paths)} == {
        "001.jpg": ['A sign, "stop" , red .'],
        "002.jpg": ["A dog , a cat , both asleep .", '"unfinished'],
        "003.jpg": ['"Hello" says a man, "bye" she said "'],
    }
    assert train.missing == 1


def test_fiftyone_boxes_only(tmp_path):
    (tmp_path / "data").mkdir()
    write_json(
        tmp_path / "labels.json",
        {
            "images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 3}],
        },
    )
    message = refusal(read_splits, tmp_path, config())
    assert (
        "labels.json: its annotations have no captions" in message
        and "annotations_trainval2014.zip" in message
    )


@pytest.mark.parametrize(
    "files",
    [
        ["train2014/1.jpg", "val2014/2.jpg"],
        ["train2017/1.jpg", "annotations/instances_train2017.json"],
        ["annotations/instances_val2014.json", "images/1.jpg"],
    ],
)
def test_a_mirror_without_captions_is_named(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    message = refusal(_detect_layout, tmp_path)
    year = 2017 if "2017" in files[0] else 2014
    assert (
        "without their captions" in message
        and f"captions_train{year}.json" in message
        and f"https://s3.amazonaws.com/images.cocodataset.org/annotations/annotations_trainval{year}.zip"
        in message
        and files[0].split("/")[0] in message
    )


def test_what_is_no_layout(tmp_path):
    assert "there is no such folder" in refusal(_detect_layout, tmp_path / "x")
    assert "only nothing" in refusal(_detect_layout, tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    message = refusal(_detect_layout, tmp_path)
    assert "notes.csv" in message and all(f"{name}: " in message for name in _LAYOUTS)
    write_layout(tmp_path / "sub", "csv", truth([1]))
    assert f"name {tmp_path / 'sub'} instead" in refusal(_detect_layout, tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file_name,caption\n")
    assert "a.csv and b.csv both" in refusal(_detect_layout, tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("file_name,caption\n", "it lists no images"),
        ("file_name,caption\na.jpg,one, two\n", "line 2 has more fields"),
        ("file_name,caption\na.jpg\n", "line 2 has fewer fields"),
        ("file_name,caption\na.jpg, \n", "line 2 has the caption ' '"),
        ("file_name,caption\n../a.jpg,x\n", "line 2 has the file name '../a.jpg'"),
        ("file_name,caption\n/a.jpg,x\n", "below the folder"),
        ("file_name,caption\nsub/../../a.jpg,x\n", "below the folder"),
        ("file_name,caption,split\na.jpg,x,private\n", "has the split 'private'"),
        ("file_name,caption,split\na.jpg,x,train\na.jpg,y,val\n", 'line 3 gives "a.jpg" another split'),
        (
            "file_name,caption,image_id\na.jpg,x,1\na.jpg,y,2\n",
            'line 3 gives "a.jpg" another split or image_id',
        ),
        ("file_name,caption,image_id\na.jpg,x,1\nb.jpg,y,1\n", "have the same image id 1"),
        ("file_name,caption,image_id\na.jpg,x,one\n", "has the image_id 'one'"),
        ("file_name,caption\nb.jpg,x\n", "none of the 1 listed images, such as 'b.jpg'"),
    ],
)
def test_a_csv_that_is_refused(tmp_path, text, expected):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "mine.csv").write_text(text)
    message = refusal(read_splits, tmp_path, config(1, 1, 0))
    assert expected in message and str(tmp_path) in message


def test_a_csv_in_another_encoding(tmp_path):
    (tmp_path / "mine.csv").write_bytes("file_name,caption\na.jpg,\0ein B\xe4r\n".encode("latin-1"))
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    assert "mine.csv" in refusal(read_splits, tmp_path, config(1, 1, 0))


@pytest.mark.parametrize(
    "counts, expected",
    [
        ((30, 2, 0), "ask for fewer"),
        ((None, None, 0), "say how many images each"),
        ((20, None, None), "say how many"),
        ((16, 4, 5), "4 val + 16 train + 5 test"),
    ],
)
def test_more_than_there_are(tmp_path, counts, expected):
    root = write_layout(tmp_path / "data", "csv", truth(range(20, 44)))
    assert expected in refusal(read_splits, root, config(*counts))


def test_a_layout_without_training_images(tmp_path):
    put(tmp_path, [1])
    write_csv(tmp_path / "mine.csv", ["file_name", "caption", "split"], [(name_of(1), "x", "test")])
    assert "mark some as train" in refusal(read_splits, tmp_path, config(1, 1, 0))


# disjoint, and recorded


def test_an_image_in_two_splits_is_named(tmp_path):
    said = truth(range(20, 30))
    root = write_layout(tmp_path / "data", "coco", said)
    both = coco_json({id: said[id] for id in sorted(said)[1::2]} | {20: said[20]})
    write_json(root / "annotations" / "captions_val2014.json", both)
    put(root / "val2014", [20])
    assert "image 20 (020.jpg) is in both train and val" in refusal(read_splits, root, config(5, 6, 0))


def test_the_same_file_under_two_ids_is_named(tmp_path):
    train, val = read_splits(write_layout(tmp_path / "data", "csv", truth(range(20, 44))), config(4, 2, 0))
    assert "is in both train and val" in refusal(
        check_disjoint, [train, replace(val, image_paths=[train.image_paths[1], val.image_paths[1]])]
    )


def test_a_record_decides_only_about_its_own_draw(tmp_path):
    said = truth(range(20, 44))
    root = write_layout(tmp_path / "data", "csv", said)
    other = read_splits(root, config(seed=7))
    record = _split_record(other, config(seed=7))
    write_json(root / _SPLIT_FILE, {**record, "seed": 42})  # somebody else's choice of pictures
    assert read_splits(root, config()) == other and read_splits(root, config(test=0)) == other[:2]
    assert read_splits(root, config(seed=1)) != other and read_splits(root, config(train=3)) != other
    first = int(other[0].image_ids[0])
    assert first not in read_splits(root, config(), {"train": {first}})[0].image_ids
    assert record["splits"]["train"]["captions_per_image"] == {
        str(k): v
        for k, v in sorted(
            {
                k: int((np.bincount(other[0].caption_image) == k).sum())
                for k in np.bincount(other[0].caption_image)
            }.items()
        )
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_a_recorded_picture_that_is_gone_is_refused(tmp_path, layout):
    root = write_layout(tmp_path / "data", layout, truth(range(20, 44)))
    splits = read_splits(root, config())
    write_json(root / _SPLIT_FILE, _split_record(splits, config()))
    splits[1].image_paths[0].unlink()
    message = refusal(read_splits, root, config())
    assert "split.json" in message and "not on disk" in message and str(splits[1].image_ids[0]) in message


# real photographs


@pytest.mark.skipif(not COCO.is_dir(), reason="no COCO 2014 beside the repository")
def test_real_coco():
    chosen = config(200, 800, 200)
    splits = read_splits(COCO, chosen)
    assert [len(s) for s in splits] == [200, 800, 200]
    check_disjoint(splits)
    assert set(_split_record(splits, chosen)["splits"]["val"]["captions_per_image"]) <= {"5", "6", "7"}
