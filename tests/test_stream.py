"`stream=true`: training straight from tar shards gives what unpacking and packing gives, bit for bit."

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch

from clip475.app.report import _in_two_splits
from clip475.core.config import LabConfig
from clip475.core.files import LabError, error_message, write_json
from clip475.data.captions import load_split
from clip475.data.scenes import write_scenes
from clip475.data.splits import _SPLIT_FILE, _split_record
from clip475.training.batches import epoch_batches, prepare_data
from clip475.training.distributed import ProcessGroup
from clip475.training.runs import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def write_shard(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(split, rows):
    for row in rows:
        yield f"{row:04}.JPG" if row % 3 else f"{row:04}.jpg", split.image_paths[row].read_bytes()
        if row % 2:
            yield f"{row:04}.txt", "\n".join(split.captions_of(row)).encode()
        else:
            yield f"{row:04}.json", json.dumps({"caption": split.captions_of(row)[0]}).encode()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "scenes"
    write_scenes(root, train=40, val=2, seed=42, size=64, progress=False)
    return load_split(root, "train")


@pytest.fixture
def shards(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "shards"
    root.mkdir()
    for number, start in enumerate(range(0, 40, 10)):
        write_shard(root / f"{number:05}.tar", members_of(scenes, range(start, start + 10)))
    return root


def config_of(root, **changes):
    fixed = dict(data=str(root), train_images=30, val_images=8, image_size=32, batch_size=8, epochs=2)
    return LabConfig.from_preset("tiny", **{**fixed, "stream": True, **changes})


def streamed(root, **changes):
    return prepare_data(config_of(root, **changes), progress=False)


def refusal(says, root, **changes):
    return error_message(says, lambda: streamed(root, **changes))


def folder_names(path):
    return {file.name for file in path.rglob("*") if file.suffix in (".jpg", ".npy")}


def test_the_same_pairs_as_unpacked_and_nothing_of_train_is_kept(shards, tmp_path):
    train, val = streamed(shards)
    names = folder_names(tmp_path / "cache")
    assert not any(path.exists() for path in train.split.image_paths)
    assert sum(name.endswith(".jpg") for name in names) == len(val) == 8
    assert not any(name.startswith("train") for name in names)
    plain_train, plain_val = streamed(shards, stream=False)
    assert (train.split, val.split) == (plain_train.split, plain_val.split)
    assert np.array_equal(train.pixels[:], plain_train.pixels) and np.array_equal(
        val.pixels, plain_val.pixels
    )
    assert torch.equal(train.text_embeddings, plain_train.text_embeddings)


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_pair_once_per_epoch_over_all_processes(shards, world_size):
    train, _ = streamed(shards)
    config, plain = config_of(shards), streamed(shards, stream=False)[0]
    for epoch in (0, 1):
        rows, shares = [], []
        for rank in range(world_size):
            group = ProcessGroup(rank, world_size)
            batches = list(epoch_batches(train, config, epoch, group))
            for one, other in zip(batches, epoch_batches(plain, config, epoch, group), strict=True):
                assert all(map(torch.equal, one, other))
            shares.append([pixels for pixels, *_ in batches])
            rows = torch.cat([batch_rows for *_, batch_rows, _ in batches])
        assert len(rows) == len(rows.unique()) == 24  # three batches of 8; a shorter fourth is left out
        joined = torch.cat([torch.cat(parts) for parts in zip(*shares, strict=True)])
        assert np.array_equal(joined, plain.pixels[rows.numpy()])


class Stop(Exception):
    pass


def test_a_run_that_is_stopped_in_an_epoch_ends_with_the_same_bits_as_a_packed_one(
    shards, tmp_path, monkeypatch
):
    config = config_of(shards, checkpoint_steps=1)
    train, val = streamed(shards, checkpoint_steps=1)
    plain = streamed(shards, stream=False)
    whole = fit(config, *plain, tmp_path / "whole", progress=False)

    from clip475.training import runs

    save = runs._save_checkpoint

    def save_and_stop(state, *others):
        save(state, *others)
        if state.step == 2:
            raise Stop

    monkeypatch.setattr(runs, "_save_checkpoint", save_and_stop)
    with pytest.raises(Stop):
        fit(config, train, val, tmp_path / "run", progress=False)
    monkeypatch.setattr(runs, "_save_checkpoint", save)
    state = fit(config, *streamed(shards), tmp_path / "run", resume=True, progress=False)
    assert state.step == whole.step == 6
    pairs = zip(state.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def change_picture(root, scenes, stem, change):
    "Write the shard of the picture called `stem` again, with other bytes for it."
    start = int(stem) // 10 * 10
    members = [
        (name, change(data) if name.lower() == f"{stem}.jpg" else data)
        for name, data in members_of(scenes, range(start, start + 10))
    ]
    write_shard(root / f"{start // 10:05}.tar", members)


def test_a_picture_that_does_not_decode_is_refused_or_replaced(shards, scenes):
    stem = streamed(shards)[0].split.image_paths[3].stem
    change_picture(shards, scenes, stem, lambda data: data[:100])
    train, _ = streamed(shards)
    with pytest.raises(LabError, match=f"{stem}.*--on-bad replace"):
        train.pixels[:]
    mended, _ = streamed(shards, on_bad="replace")
    assert len(mended) == 30 and [file for _, file, _ in mended.bad] == [f"{stem}.jpg"]
    assert mended.pixels[:].shape == (30, 32, 32, 3)


def test_a_copy_in_two_splits_is_found_by_its_content(shards, scenes):
    train, val = streamed(shards)
    assert _in_two_splits([train, val], config_of(shards))["in_two_splits"] == []
    one, other = train.split.image_paths[0], val.split.image_paths[0]
    twin = scenes.image_paths[int(one.stem)].read_bytes()
    change_picture(shards, scenes, other.stem, lambda data: twin)
    found = _in_two_splits(streamed(shards), config_of(shards))["in_two_splits"]
    assert [sorted(pair) for pair in found] == [[f"train: {one.name}", f"val: {other.name}"]]
    mended = streamed(shards, on_copies="replace")
    assert _in_two_splits(mended, config_of(shards))["in_two_splits"] == []


def test_a_shard_that_changes_or_goes_is_refused(shards):
    train, _ = streamed(shards)
    shard, start, *_ = train.pixels.places[0]
    with open(shard, "r+b") as f:
        f.seek(start + 50)
        f.write(b"?")
    error_message("has changed in it since", train.pixels.__getitem__, 0)
    shutil.move(shard, shard + ".gone")
    error_message("cannot be read", train.pixels.__getitem__, 0)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_what_no_stream_can_read_is_refused(shards, scenes, tmp_path, kind):
    refusal("another layout", scenes.root)
    (shards / "00004.tar").write_bytes(b"")
    refusal("00004.tar", shards)
    with tarfile.open(shards / "00004.tar", "w:gz") as tar:
        for name in ("a.jpg", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    refusal("compressed", shards)
    with tarfile.open(shards / "00004.tar", "w") as tar:
        for name, data in members_of(scenes, [39]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name.endswith(".txt"):
                link = tarfile.TarInfo("again.jpg")
                link.type, link.linkname = kind, "0039.jpg"
                tar.addfile(link)
                info.name = "again.txt"
                tar.addfile(info, io.BytesIO(data))
    refusal("is a link in it", shards)
    assert not list((tmp_path / "cache" / "streamed").iterdir())


def test_a_streamed_run_is_evaluated_on_pictures_in_a_folder(shards, scenes, tmp_path):
    config, run = config_of(shards), tmp_path / "run"
    splits = [part.split for part in streamed(shards)]
    write_json(run / _SPLIT_FILE, _split_record(splits, config))
    unpacked = tmp_path / "unpacked"
    for row in range(40):
        folder = unpacked / f"{row // 10:05}"
        folder.mkdir(parents=True, exist_ok=True)
        captions = scenes.captions_of(row) if row % 2 else scenes.captions_of(row)[:1]
        (folder / f"{row:04}.jpg").write_bytes(scenes.image_paths[row].read_bytes())
        (folder / f"{row:04}.txt").write_text("\n".join(captions), encoding="utf-8")
    there = config.replace(data=str(unpacked))
    (val,) = prepare_data(there, names=("val",), run=run, progress=False)
    (same,) = prepare_data(config, names=("val",), run=run, progress=False)
    assert [p.name for p in val.split.image_paths] == [p.name for p in same.split.image_paths]
    assert np.array_equal(val.pixels, same.pixels)
    elsewhere = there.replace(data=str(scenes.root))
    error_message("none of the 30 images of the train split is on disk", prepare_data, elsewhere, run=run)
