"Towers and data as people have them: each is read as it was meant, or refused in one sentence."

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from clip475.core.config import LabConfig
from clip475.core.devices import autocast_dtype
from clip475.core.figures import save_figure, show_images
from clip475.core.files import LabError, _note_once
from clip475.data.tokens import _builtin_text_folder, load_tokenizer
from clip475.models.text import encode_texts, load_text_encoder

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
    _note_once.cache_clear()
    automatic, cpu = LabConfig.from_preset("tiny"), torch.device("cpu")
    for _ in range(2):
        chosen = autocast_dtype(automatic.replace(precision="fp16"), cpu)
        assert chosen == autocast_dtype(automatic, cpu)
    assert capsys.readouterr().err.count("fp16 takes many times as long on a CPU") == 1
    assert autocast_dtype(automatic.replace(precision="fp16"), torch.device("cuda")) == torch.float16


# ── figures ──


def test_characters_that_no_font_has_are_named(tmp_path, capsys, recwarn):
    _note_once.cache_clear()
    figure = show_images([np.zeros((8, 8, 3), np.uint8)], ["a cat: \U00012031, as seen in Ur"])
    save_figure(figure, tmp_path / "cuneiform.png")
    note = capsys.readouterr().err
    assert note.count("\U00012031") == 1 and "drawn as boxes" in note and not recwarn.list
