"Probes: the first caption true and the others false by an oracle that shares no code with them, and every accuracy found again by loops."
import numpy as np, pytest, torch
import torch.nn.functional as F

from clip475.core import LabConfig, fails_with
from clip475.probes import PAIRED, SINGLE, alternatives, describe, scene_probes, true_wins
from clip475.scenes import VAL_START, _columns, caption_scene, make_scene, true_of
from clip475.text import encode_texts, known_token_share, load_text_encoder, load_tokenizer
from clip475.zeroshot import alone


pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def tower(): return load_text_encoder(LabConfig()), load_tokenizer()

@pytest.fixture(scope="module")
def scenes(): return [make_scene(42, VAL_START + i) for i in range(300)]

def random_unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("fact", [*SINGLE, *PAIRED])
def test_the_first_caption_is_true_and_the_others_are_false(scenes, fact):
    "The oracle of the scenes compares claims with truth; it shares no code with the probes."
    if fact in SINGLE: scenes = [alone(s) for s in scenes]
    asked = [(s, said) for s in scenes if (said := alternatives(s, fact))]
    assert len(asked) > 30
    for scene, said in asked:
        table = _columns([scene])
        assert [bool(true_of(c, table)[0]) for c in said] == [True] + [False]*(len(said) - 1)
        assert len({c.text for c in said}) == len(said) == len(alternatives(asked[0][0], fact))

def test_probes_of_order_keep_the_words(scenes):
    for fact in ("whose colour", "whose number"):
        for scene in scenes:
            if not (said := alternatives(scene, fact)): continue
            forms = [sorted(m.__dict__[k] for m in c.mentions for k in ("kind",)) + sorted(m.colour for m in c.mentions) + sorted(str(m.count) for m in c.mentions) for c in said]
            assert forms[0] == forms[1]

def test_words_are_those_of_the_scenes(scenes, tower):
    texts = [c.text for s in scenes for f in PAIRED for c in alternatives(s, f) or []] + [c.text for s in map(alone, scenes) for f in SINGLE for c in alternatives(s, f)]
    assert known_token_share(texts, tower[1], tower[0])[0] == 1
    said = {c.text.lower().rstrip(".") for s in map(alone, [make_scene(1, i) for i in range(3000)]) for c in caption_scene(s)}
    assert describe(alone(scenes[0]).things[0]).lower() in " ".join(said)

def test_an_oracle_gets_everything_and_a_deaf_one_nothing(scenes, tower):
    captions = [[c.text for c in alternatives(alone(s), "kind")] for s in scenes[:40]]
    knows = torch.stack([encode_texts(c[0], *tower)[0] for c in captions])
    assert true_wins(knows, captions, *tower).all()
    lies = torch.stack([encode_texts(c[3], *tower)[0] for c in captions])
    assert not true_wins(lies, captions, *tower).any()
    assert not true_wins(knows[:2], [["a dog", "a  DOG"]]*2, *tower).any()             # a tie is lost
    fails_with("at least two", true_wins, knows[:2], [["a dog"], ["a dog", "a cat"]], *tower)
    fails_with("at least two", true_wins, knows[:2], captions[:3], *tower)

def test_accuracy_of_probes_by_brute_force(scenes, tower):
    "A tower whose pictures are random: every number of the table is found again by loops."
    def embed(pixels): return random_unit(len(pixels), 512, seed=len(pixels))
    table = scene_probes(embed, *tower, count=60, size=32)
    assert list(table.index) == [*SINGLE, *PAIRED] and np.allclose(table.chance, 1/table.captions)
    for fact in ("colour", "whose colour", "left or right"):
        some = [alone(s) for s in scenes[:60]] if fact in SINGLE else [s for s in scenes[:60] if len(s.things) == 2]
        images, won = random_unit(len(some), 512, seed=len(some)), []
        for i, s in enumerate(some):
            if (said := alternatives(s, fact)) is None: continue
            scores = [float(encode_texts(c.text, *tower)[0].double() @ images[i].double()) for c in said]
            won.append(all(scores[0] > other for other in scores[1:]))
        assert table.accuracy[fact] == np.mean(won) and table.pictures[fact] == len(won)

def test_probe_questions_that_make_no_sense(scenes, tower):
    fails_with("fact 'smell' is not known", alternatives, scenes[0], "smell")
    fails_with("at least 20", scene_probes, None, *tower, count=3)
    assert alternatives(alone(scenes[0]), "whose colour") is None
