"The reader and the packer on a real piece of COCO 2014, where one lies beside the repository."

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.captions import (
    _caption_file,
    _load_splits,
    _make_split,
    _read_captions,
    describe_split,
    load_split,
)
from clip475.data.images import _read_square, pack_images
from clip475.data.pixels import load_image, resize_square
from clip475.evaluation.mistakes import _RULES, mistake_numbers
from clip475.evaluation.retrieval import caption_means
from clip475.searching.index import SearchIndex

COCO = Path(__file__).parents[1].parent / "shared" / "data" / "coco2014"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason="no COCO 2014 beside the repository")


@pytest.fixture(scope="module")
def val():
    return load_split(COCO, "val")


@pytest.mark.parametrize("name, listed, on_disk", [("val", 40_504, 1_180), ("train", 4_045, 287)])
def test_counts(name, listed, on_disk):
    split = load_split(COCO, name)
    assert (len(split), split.missing) == (on_disk, listed - on_disk)
    assert set(np.bincount(split.caption_image)) <= {5, 6, 7}
    assert describe_split(split).loc[name, "images"] == on_disk


def test_the_whole_val_file_is_read():
    coco = _read_captions(_caption_file(COCO, "val"))
    split = _make_split(coco, COCO, "val")
    assert len(coco.anns) == 202_654 and len(coco.imgs) == 40_504 and len(split) == 1_180


def test_pairs_are_those_of_the_annotation_file(val):
    coco = _read_captions(_caption_file(COCO, "val"))
    for row, id in enumerate(val.image_ids.tolist()):
        assert val.image_paths[row].name == coco.imgs[id]["file_name"]
        assert sorted(val.captions_of(row)) == sorted(a["caption"].strip() for a in coco.imgToAnns[id])


def test_more_than_there_are(val):
    with pytest.raises(LabError, match="at most 1180"):
        load_split(COCO, "val", 4_000)


def test_train_and_val_share_nothing():
    train, val = _load_splits(COCO, LabConfig.from_preset("coco", train_images=200, val_images=1_000))
    assert (len(train), len(val)) == (200, 1_000) and not set(train.image_ids) & set(val.image_ids)


@pytest.mark.parametrize("name", ["val", "train"])
def test_every_picture_decodes_and_packs(name, tmp_path):
    split = load_split(COCO, name)
    packed = pack_images(split, 64, tmp_path, progress=False)
    assert packed.shape == (len(split), 64, 64, 3)
    for row in range(0, len(split), 59):
        assert (packed[row] == _read_square(split.image_paths[row], 64)).all()
        assert (
            np.abs(packed[row] - resize_square(load_image(split.image_paths[row]), 64).astype(int)).mean() < 6
        )  # close to the whole decode
    flat = packed.reshape(len(split), -1)
    assert (flat.std(axis=1) > 1).all()  # no picture has become one colour
    assert len(np.unique(flat, axis=0)) == len(split)


def test_what_went_wrong_on_real_captions_and_pictures(val):
    texts = torch.nn.functional.normalize(
        torch.from_numpy(
            TruncatedSVD(64, random_state=475).fit_transform(TfidfVectorizer().fit_transform(val.captions))
        ).float()
    )
    index = SearchIndex.build(
        caption_means(texts, val.caption_image, len(val)),
        val.image_paths,
        val.image_ids,
        texts,
        val.captions,
        val.caption_image,
    )
    known = set(val.captions)
    for name, (_, rule) in _RULES.items():
        rows = rule(index)
        assert rows, name
        for row in rows:
            assert all(
                isinstance(x, str) and x in known if name == "hubs" else x.size[0] > 1 for x in row.results
            )
    numbers = mistake_numbers(index)
    assert 0 < numbers["better_elsewhere"] < numbers["first_is_wrong"] < 0.6 and numbers["hub_skewness"] > 0
