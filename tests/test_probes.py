"""Probes: the first caption true and the others false by an oracle that shares no code with them, and every
accuracy found again by loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip475.core.config import LabConfig
from clip475.core.files import error_message
from clip475.data.scenes import _VAL_START, _columns, _true_of, caption_scene, make_scene
from clip475.data.tokens import load_tokenizer
from clip475.evaluation.zeroshot import (
    _PAIRED,
    _SINGLE,
    _alone,
    _alternatives,
    _describe,
    _scene_probes,
    _true_wins,
)
from clip475.models.text import encode_texts, known_token_share, load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tower():
    return load_text_encoder(LabConfig()), load_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(42, _VAL_START + i) for i in range(300)]


def random_unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("fact", [*_SINGLE, *_PAIRED])
def test_the_first_caption_is_true_and_the_others_are_false(scenes, fact):
    "The oracle of the scenes compares claims with truth; it shares no code with the probes."
    if fact in _SINGLE:
        scenes = [_alone(s) for s in scenes]
    asked = [(s, said) for s in scenes if (said := _alternatives(s, fact))]
    assert len(asked) > 30
    for scene, said in asked:
        table = _columns([scene])
        assert [bool(_true_of(c, table)[0]) for c in said] == [True] + [False] * (len(said) - 1)
        assert len({c.text for c in said}) == len(said) == len(_alternatives(asked[0][0], fact))


def test_probes_of_order_keep_the_words(scenes):
    for fact in ("whose colour", "whose number"):
        for scene in scenes:
            if not (said := _alternatives(scene, fact)):
                continue
            forms = [
                sorted(m.__dict__[k] for m in c.mentions for k in ("kind",))
                + sorted(m.colour for m in c.mentions)
                + sorted(str(m.count) for m in c.mentions)
                for c in said
            ]
            assert forms[0] == forms[1]


def test_words_are_those_of_the_scenes(scenes, tower):
    texts = [c.text for s in scenes for f in _PAIRED for c in _alternatives(s, f) or []] + [
        c.text for s in map(_alone, scenes) for f in _SINGLE for c in _alternatives(s, f)
    ]
    assert known_token_share(texts, tower[1], tower[0])[0] == 1
    said = {
        c.text.lower().rstrip(".")
        for s in map(_alone, [make_scene(1, i) for i in range(3000)])
        for c in caption_scene(s)
    }
    assert _describe(_alone(scenes[0]).things[0]).lower() in " ".join(said)


def test_an_oracle_gets_everything_and_a_deaf_one_nothing(scenes, tower):
    captions = [[c.text for c in _alternatives(_alone(s), "kind")] for s in scenes[:40]]
    knows = torch.stack([encode_texts(c[0], *tower)[0] for c in captions])
    assert _true_wins(knows, captions, *tower).all()
    lies = torch.stack([encode_texts(c[3], *tower)[0] for c in captions])
    assert not _true_wins(lies, captions, *tower).any()
    assert not _true_wins(knows[:2], [["a dog", "a  DOG"]] * 2, *tower).any()  # a tie is lost
    error_message("at least two", _true_wins, knows[:2], [["a dog"], ["a dog", "a cat"]], *tower)
    error_message("at least two", _true_wins, knows[:2], captions[:3], *tower)


def test_accuracy_of_probes_by_brute_force(scenes, tower):
    "A tower whose pictures are random: every number of the table is found again by loops."

    def embed(pixels):
        return random_unit(len(pixels), 512, seed=len(pixels))

    table = _scene_probes(embed, *tower, count=60, size=32)
    assert list(table.index) == [*_SINGLE, *_PAIRED] and np.allclose(table.chance, 1 / table.captions)
    for fact in ("colour", "whose colour", "left or right"):
        some = (
            [_alone(s) for s in scenes[:60]]
            if fact in _SINGLE
            else [s for s in scenes[:60] if len(s.things) == 2]
        )
        images, won = random_unit(len(some), 512, seed=len(some)), []
        for i, s in enumerate(some):
            if (said := _alternatives(s, fact)) is None:
                continue
            scores = [float(encode_texts(c.text, *tower)[0].double() @ images[i].double()) for c in said]
            won.append(all(scores[0] > other for other in scores[1:]))
        assert table.accuracy[fact] == np.mean(won) and table.pictures[fact] == len(won)


def test_probe_questions_that_make_no_sense(scenes, tower):
    error_message("fact 'smell' is not known", _alternatives, scenes[0], "smell")
    error_message("at least 20", _scene_probes, None, *tower, count=3)
    assert _alternatives(_alone(scenes[0]), "whose colour") is None
