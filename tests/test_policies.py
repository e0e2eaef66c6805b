"""Policies: what trains, what stays to the bit, and that nothing is left of a policy applied before."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clip475.core.config import LabConfig
from clip475.core.devices import seed_everything
from clip475.core.files import error_message
from clip475.data.tokens import load_tokenizer, tokenize
from clip475.models.freezing import audit_freeze, changed_tensors, snapshot
from clip475.models.joint import (
    _state_to_save,
    _style_parameter_table,
    _weight_decay_groups,
    build_model,
    load_model,
    parameter_groups,
    parameter_summary,
    parameter_table,
    save_model,
)
from clip475.models.policies import POLICIES, apply_policy
from clip475.models.tables import (
    _markdown_table,
    _model_parts,
    _plot_parameters,
    _specification_table,
    component_table,
    plot_towers,
)
from clip475.models.text import encode_texts

TINY = LabConfig.from_preset("tiny", image_size=32)
COCO = LabConfig.from_preset("coco")
CAPTIONS = ["a red boat", "two dogs left of a tree", "a man on a horse", "boat", "a blue house at night"]
GOLDEN = {
    "spec": 28_753_472,
    "locked-image": 63_428_096,
    "head-only": 5_245_440,
    "last-block": 9_708_032,
    "last-n": 20_210_176,
    "text-projection": 29_015_616,
    "norms-only": 53_120,
    "all": 92_181_568,
    "none": 0,
}
TRAINING = [p for p in POLICIES if p != "none"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens():
    return tokenize(CAPTIONS, load_tokenizer(), padding="longest")


@pytest.fixture(scope="module")
def fresh():
    seed_everything(0)
    return build_model(TINY)


@pytest.fixture
def model(fresh):
    return copy.deepcopy(fresh)


@pytest.fixture(scope="module")
def specified():
    with torch.device("meta"):
        return build_model(COCO, pretrained=False)


def loss_of(model, tokens):
    images, texts = model(torch.randn(5, 3, 32, 32), **tokens)
    bias = 0 if model.logit_bias is None else model.logit_bias
    return F.cross_entropy(model.logit_scale.exp() * images @ texts.T + bias, torch.arange(5))


def train_a_little(model, tokens, groups=None, steps=3):
    optimizer = torch.optim.AdamW(groups or _weight_decay_groups(model, 0.1), lr=1e-2)
    for _ in range(steps):
        loss = loss_of(model.train(), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


# ---- what trains ----


def test_every_policy_has_a_golden_count():
    assert set(GOLDEN) == set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_counts(specified, policy):
    report = apply_policy(specified, policy)
    assert (
        report.trainable == GOLDEN[policy] == parameter_summary(specified)["trainable"]
        and report.total == 92_181_568
    )
    assert specified.logit_scale.requires_grad == (policy != "none")
    assert (
        report.text_trains
        == (policy in ("locked-image", "text-projection", "all"))
        == (not specified.text_encoder.frozen)
    )
    assert report.image_trains == (policy not in ("locked-image", "none"))
    assert report.table["trainable"].sum() == GOLDEN[policy] + (policy != "none")
    assert json.loads(json.dumps(report.to_dict()))["trainable"] == GOLDEN[policy]
    assert (
        f"{GOLDEN[policy]:,}" in str(report)
        and POLICIES[policy] in str(report)
        and "<table" in report._repr_html_()
    )
    apply_policy(specified, "spec")


def test_last_n_counts_blocks(specified):
    counts = [apply_policy(specified, "last-n", n=n).trainable for n in range(1, 17)]
    assert (
        counts[0] == GOLDEN["last-block"] and counts[2] == GOLDEN["last-n"] and counts == sorted(set(counts))
    )
    assert counts[-1] == GOLDEN["spec"] - sum(
        p.numel() for m in _model_parts(specified)["stem"] for p in m.parameters()
    )
    for n in (0, 17, None, -1):
        error_message("from 1 to 16", apply_policy, specified, "last-n", n=n)
    apply_policy(specified, "spec")


def test_the_specification_and_lit_are_mirror_images(model):
    def trains(policy):
        apply_policy(model, policy)
        return {n for n, p in model.named_parameters() if p.requires_grad} - {"logit_scale"}

    spec, lit = trains("spec"), trains("locked-image")
    assert not spec & lit and spec | lit == trains("all")
    assert all(n.startswith("image_encoder.") for n in spec) and all(
        n.startswith("text_encoder.") for n in lit
    )


def test_what_is_unknown_is_refused_and_changes_nothing(model):
    apply_policy(model, "head-only")
    before = state_of(model)
    for name in POLICIES:
        assert name in error_message("choose one of", apply_policy, model, "LiT")
    error_message("choose one of: train, frozen", apply_policy, model, "spec", batchnorm="eval")
    error_message("from 1 to 4", apply_policy, model, "last-n", n=9)
    assert state_of(model) == before


# ---- what stays ----


@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
@pytest.mark.parametrize("policy", TRAINING)
def test_what_is_frozen_stays_to_the_bit(model, tokens, policy, batchnorm):
    apply_policy(model, policy, batchnorm=batchnorm)
    before = snapshot(model)
    optimizer = train_a_little(model, tokens)
    moved = set(changed_tensors(before, snapshot(model)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.BatchNorm2d) and any(p.requires_grad for p in m.parameters())
    }
    follow = (
        {f"{n}.{b}" for n in norms for b in ("running_mean", "running_var", "num_batches_tracked")}
        if batchnorm == "train"
        else set()
    )
    assert moved == trained | follow, sorted(moved ^ (trained | follow))
    assert audit_freeze(model).empty
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert component_table(model)["optimizer"].iloc[:-1].sum() == held


def test_statistics_that_are_frozen_hold_in_every_mode(model):
    apply_policy(model, "spec", batchnorm="frozen")
    before = snapshot(model)
    for mode in (True, False, True):
        model.image_encoder.train(mode)
        with torch.no_grad():
            model.encode_image(torch.randn(4, 3, 32, 32))
    assert changed_tensors(before, snapshot(model)) == []


def test_dropout_of_a_frozen_part_is_off(model):
    model.image_encoder.backbone.layer1.add_module("noise", torch.nn.Dropout(0.5))
    apply_policy(model.train(), "last-block")
    assert (
        not model.image_encoder.backbone.layer1.noise.training
        and model.image_encoder.backbone.layer4.training
    )
    apply_policy(model, "spec")
    assert model.image_encoder.backbone.layer1.noise.training


# ---- applied and undone ----


def state_of(model):
    "All that a policy may touch."
    modes = []
    for mode in (False, True):
        model.train(mode)
        modes.append({n: m.training for n, m in model.named_modules()})
    return (
        {n: p.requires_grad for n, p in model.named_parameters()},
        modes,
        model.text_encoder.frozen,
        model.frozen_parts,
        model.image_encoder.frozen_parts,
        model.policy,
    )


POLICY = st.tuples(st.sampled_from(list(POLICIES)), st.sampled_from(["train", "frozen"]), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(st.lists(POLICY, min_size=1, max_size=5), st.booleans())
def test_a_policy_leaves_no_trace_of_the_ones_before(fresh, sequence, mode):
    name, batchnorm, n = sequence[-1]
    once, often = copy.deepcopy(fresh).train(mode), copy.deepcopy(fresh).train(mode)
    apply_policy(once, name, batchnorm, n)
    for step in sequence:
        apply_policy(often, *step)
    assert often.training == once.training == mode
    assert state_of(often) == state_of(once) and audit_freeze(often).empty
    again = apply_policy(often, name, batchnorm, n)  # idempotent
    assert (
        state_of(often) == state_of(once)
        and not again.table[["newly trainable", "newly frozen"]].to_numpy().any()
    )
    assert changed_tensors(snapshot(fresh), snapshot(often)) == []


def test_spec_is_what_a_fresh_model_is(fresh, model):
    apply_policy(model, "all")
    apply_policy(model, "spec")
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert [m.training for m in model.train().modules()] == [
        m.training for m in copy.deepcopy(fresh).train().modules()
    ]


def test_the_report_says_what_changed(model):
    apply_policy(model, "spec")
    table = apply_policy(model, "head-only").table.set_index("part")
    assert (table.loc["layer1", "newly frozen"], table.loc["layer1", "newly trainable"]) == (
        table.loc["layer1", "parameters"],
        0,
    )
    assert (
        table.loc["projection head", "newly frozen"] == 0
        and table.loc["layer1", "BatchNorm"] == "2 of 2 frozen"
    )
    assert apply_policy(model, "spec").table.set_index("part").loc["layer1", "BatchNorm"] == "0 of 2 frozen"


# ---- no graph where nothing trains ----


def saved_bytes(fn):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fn()
    return out, sum(t.numel() for t in kept)


@pytest.mark.parametrize(
    "policy, image, text",
    [
        ("spec", True, False),
        ("locked-image", False, True),
        ("none", False, False),
        ("all", True, True),
        ("text-projection", True, True),
    ],
)
def test_a_frozen_tower_builds_no_graph(model, tokens, policy, image, text):
    apply_policy(model.train(), policy)
    pictures, kept_image = saved_bytes(lambda: model.encode_image(torch.randn(2, 3, 32, 32)))
    words, kept_text = saved_bytes(lambda: model.encode_text(**tokens))
    assert (pictures.grad_fn is not None, kept_image > 0) == (image, image) and (
        words.grad_fn is not None,
        kept_text > 0,
    ) == (text, text)


def test_what_lies_below_the_first_trained_layer_keeps_nothing(model):
    def kept(policy, **more):
        apply_policy(model.train(), policy, **more)
        return saved_bytes(lambda: model.encode_image(torch.randn(2, 3, 32, 32)))[1]

    sizes = [kept("head-only"), kept("last-block"), kept("last-n", n=2), kept("last-n", n=3), kept("spec")]
    assert sizes == sorted(set(sizes)) and kept("norms-only") > sizes[2]
    backbone = model.image_encoder.backbone
    apply_policy(model.train(), "head-only")
    assert backbone(torch.randn(2, 3, 32, 32)).grad_fn is None
    apply_policy(model, "text-projection")
    assert (
        model.text_encoder.tower.text_model(torch.tensor([[49406, 320, 49407]])).pooler_output.grad_fn is None
    )


# ---- broken freezes ----


def test_a_freeze_that_is_undone_by_hand_is_named(model):
    apply_policy(model.train(), "head-only")
    assert audit_freeze(model).empty
    model.image_encoder.backbone.layer2[0].bn1.train()
    found = audit_freeze(model)
    assert (
        "image_encoder.backbone.layer2.0.bn1" in found["module"].tolist()
        and found["finding"].str.contains("drift|freezes its statistics").all()
    )
    model.train()
    assert audit_freeze(model).empty
    model.image_encoder.backbone.layer3[0].conv1.weight.requires_grad_(True)
    assert "image_encoder.backbone.layer3.0.conv1.weight" in audit_freeze(model)["module"].tolist()
    apply_policy(model, "head-only")
    model.image_encoder.head.requires_grad = False  # on the module
    assert audit_freeze(model)["module"].tolist() == ["image_encoder.head"]


def test_weights_frozen_and_statistics_drifting(model):
    model.image_encoder.backbone.requires_grad_(False)  # by hand, without a policy
    found = audit_freeze(model.train())
    assert len(found) == 12 and found["finding"].str.contains("drift").all()
    apply_policy(model, "head-only")
    assert audit_freeze(model.train()).empty


def test_gradients_of_what_is_frozen_are_dropped(model, tokens):
    optimizer = train_a_little(model, tokens, steps=1)
    apply_policy(model, "head-only")
    before = snapshot(model)
    optimizer.step()
    assert {n.split(".")[1] for n in changed_tensors(before, snapshot(model)) if "." in n} == {"head"}


# ---- what a file of the model holds ----


def text_saved(model):
    return any(k.startswith("text_encoder.") for k in _state_to_save(model))


def test_a_text_tower_that_trained_is_never_lost(model, tokens, tmp_path):
    assert not text_saved(model)
    apply_policy(model, "locked-image")
    assert text_saved(model)
    apply_policy(model, "spec")
    assert not text_saved(model)  # it was free and did not move
    apply_policy(model, "text-projection")
    train_a_little(model, tokens)
    apply_policy(model, "spec")
    assert text_saved(model)  # frozen again, but no longer what it was
    again, _ = load_model(save_model(model, TINY, tmp_path))
    assert changed_tensors(snapshot(model), snapshot(again)) == []


@pytest.mark.parametrize("policy", ["locked-image", "head-only", "norms-only", "none"])
def test_saved_and_loaded_under_any_policy(model, tokens, tmp_path, policy):
    apply_policy(model, policy)
    if policy != "none":
        train_a_little(model, tokens)
    again, config = load_model(save_model(model, TINY, tmp_path))
    assert config == TINY and changed_tensors(snapshot(model), snapshot(again)) == []
    apply_policy(again, policy)
    apply_policy(model, policy)
    assert state_of(again) == state_of(model)


def test_encoding_text_leaves_a_policy_in_place(model):
    apply_policy(model.train(), "text-projection")
    encode_texts(CAPTIONS, model.text_encoder, load_tokenizer())
    assert audit_freeze(model.train()).empty


# ---- the logit bias ----


def test_the_logit_bias_is_there_for_the_sigmoid_loss_alone(tmp_path, tokens):
    config = TINY.replace(loss="siglip", init_temperature=0.1)
    model, plain = build_model(config), build_model(TINY)
    assert model.logit_bias.item() == -10 and abs(model.logit_scale.exp().item() - 10) < 1e-5
    assert (
        plain.logit_bias is None
        and "logit_bias" not in plain.state_dict()
        and "logit_bias" in _state_to_save(model)
    )
    assert any(p is model.logit_bias for p in _weight_decay_groups(model, 0.1)[1]["params"])
    table, summary = parameter_table(model), parameter_summary(model)
    assert table["component"].tolist()[-3:] == [
        "logit scale",
        "logit bias",
        "total without the logit scale and logit bias",
    ]
    assert summary["total"] == parameter_summary(plain)["total"] and summary["components"][-1] == {
        "name": "logit bias",
        "parameters": 1,
        "trainable": True,
    }
    assert parameter_table(plain)["component"].tolist()[-1] == "total without the logit scale"
    train_a_little(model, tokens)
    again, _ = load_model(save_model(model, config, tmp_path))
    assert torch.equal(again.logit_bias, model.logit_bias) and again.logit_bias != -10
    TINY.save(tmp_path / "config.json")
    error_message("logit_bias", load_model, tmp_path)
    assert not apply_policy(model, "none").trainable and not model.logit_bias.requires_grad


# ---- what AdamW is given ----


def ids(groups):
    return [[id(p) for p in g["params"]] for g in groups]


def test_default_groups_train_to_the_same_bits(fresh, tokens):
    results = []
    for groups in (
        lambda m: _weight_decay_groups(m, TINY.weight_decay),
        lambda m: parameter_groups(m, TINY),
    ):
        model = copy.deepcopy(fresh)
        torch.manual_seed(3)
        train_a_little(model, tokens, groups(model))
        results.append(snapshot(model))
    assert changed_tensors(*results) == []


@pytest.mark.parametrize("policy", TRAINING)
def test_default_groups_are_the_two_of_trainable_parameters(model, policy):
    apply_policy(model, policy)
    groups = parameter_groups(model, TINY)
    assert ids(groups) == [g for g in ids(_weight_decay_groups(model, TINY.weight_decay)) if g] and all(
        g["rate"] == 1 for g in groups
    )


def test_stages_learn_at_their_own_rates(specified):
    config = COCO.replace(backbone_rate=0.1, layer_decay=0.5)
    rate = {
        id(p): (g["rate"], g["weight_decay"])
        for g in parameter_groups(specified, config)
        for p in g["params"]
    }
    expected = {
        "stem": 0.00625,
        "layer1": 0.0125,
        "layer2": 0.025,
        "layer3": 0.05,
        "layer4": 0.1,
        "projection head": 1,
        "logit scale": 1,
    }
    for part, things in _model_parts(specified).items():
        for p in [
            p
            for t in things
            for p in ([t] if isinstance(t, torch.nn.Parameter) else t.parameters())
            if p.requires_grad
        ]:
            assert rate[id(p)] == (pytest.approx(expected[part]), COCO.weight_decay if p.ndim > 1 else 0)
    assert len(rate) == sum(p.requires_grad for p in specified.parameters())
    assert ids(parameter_groups(specified, config)) == ids(parameter_groups(specified, config))


def test_a_rate_of_nothing_moves_nothing(model, tokens):
    groups = parameter_groups(model, TINY.replace(backbone_rate=0.0))
    for g in groups:
        g["lr"] = 1e-2 * g["rate"]
    before = snapshot(model)
    train_a_little(model, tokens, groups)
    moved = [
        n for n in changed_tensors(before, snapshot(model)) if "running_" not in n and "num_batches" not in n
    ]
    assert moved and not [n for n in moved if ".backbone." in n]


def test_a_random_backbone_where_a_checkpoint_follows(monkeypatch):
    def no_file(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr("clip475.models.backbones._torchvision_weights", no_file)
    model = build_model(
        TINY.replace(backbone="resnet18", backbone_weights="IMAGENET1K_V1"), backbone_weights=False
    )
    assert model.text_encoder.pretrained


# ---- averages ----


def test_an_average_saves_and_loads(model, tokens, tmp_path):
    apply_policy(model, "spec")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    before = snapshot(average.module.text_encoder)
    for _ in range(3):
        train_a_little(model, tokens, steps=1)
        average.update_parameters(model)
    assert (
        changed_tensors(before, snapshot(average.module.text_encoder)) == []
    )  # the frozen tower averages to itself
    assert "image_encoder.backbone.bn1.running_mean" in changed_tensors(
        snapshot(model), snapshot(average.module)
    )
    torch.save({"average": average.state_dict()}, tmp_path / "average.pt")
    again = AveragedModel(build_model(TINY), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    again.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True)["average"])
    assert changed_tensors(snapshot(average), snapshot(again)) == [] and again.n_averaged == 3
    loaded, _ = load_model(save_model(average.module, TINY, tmp_path / "run"))
    assert changed_tensors(snapshot(average.module), snapshot(loaded)) == []


# ---- tables and drawings ----


def test_component_table_is_exact(specified):
    table = component_table(specified).set_index("component")
    assert table["parameters"].tolist() == [23_508_032, 5_245_440, 63_428_096, 1, 92_181_568]
    assert table.loc["text encoder", ["weights", "gradients", "optimizer"]].tolist() == [253_712_384, 0, 0]
    assert table.loc["backbone", ["weights", "gradients"]].tolist() == [94_032_128, 94_032_128]
    assert (
        table.loc["backbone", "optimizer"] == 2 * 94_032_128 + 4 * 159
        and table.loc["backbone", "buffers"] == 4 * 53_120 + 8 * 53
    )
    fine = component_table(specified, fine=True)
    for column in ("parameters", "trainable", "frozen", "weights", "gradients", "optimizer", "buffers"):
        assert fine[column].iloc[:-2].sum() == fine[column].iloc[-1] == table[column].iloc[-1]
    assert "23,508,032" in _style_parameter_table(
        component_table(specified)
    ).to_html() and "| 63,428,096 | 0 |" in _markdown_table(component_table(specified))


def test_tables_take_any_module_and_count_what_is_shared_once():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    net.register_parameter("gain", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    table = component_table(net).set_index("component")
    assert (
        table["parameters"].to_dict() == {"0": 12, "1": 0, "its own": 2, "total": 14}
        and table.loc["total", "frozen"] == 2
    )
    assert table.loc["total", "optimizer"] == 2 * 4 * 12 + 4 * 2


def test_the_specifications_rounded_figures(specified):
    table = _specification_table(specified).set_index("figure")
    assert table["specification"].tolist() == ["~23M", "~6M", "~63M", "~92M", "~28M", "~30 %"]
    assert table["remark"].to_dict() == {
        "backbone": "23.51M cut off, not rounded",
        "projection head": "5.25M, rounded up; it is 5,245,440",
        "text encoder": "as it rounds",
        "total": "as it rounds",
        "trainable": "28.75M cut off, not rounded",
        "share trained": "31.2%, rounded to tens",
    }


def texts_of(fig):
    return "\n".join(t.get_text() for ax in fig.axes for t in [*ax.texts, *ax.get_yticklabels()])


@pytest.mark.parametrize("policy", POLICIES)
def test_drawings_show_every_policy(model, policy):
    apply_policy(model, policy)
    before, state = snapshot(model), state_of(model)
    model.train(False)
    fig = plot_towers(model, 32)
    words, hatched = texts_of(fig), [p for p in fig.axes[0].patches if p.get_hatch()]
    assert changed_tensors(before, snapshot(model)) == [] and state_of(model) == state
    assert ("frozen" in words, bool(hatched)) == (policy != "all", policy != "all") and (
        "trainable" in words
    ) == (policy not in ("none", "norms-only"))
    assert ("partly frozen" in words) == (policy == "norms-only")
    assert f"τ {'fixed' if policy == 'none' else 'learned'}, now 0.070" in words
    assert f"{parameter_summary(model)['total']:,}" in texts_of(_plot_parameters(model)) and not any(
        m._forward_hooks for m in model.modules()
    )
