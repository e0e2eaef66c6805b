"The options of training, each against what it says it does, and what a run does when things go wrong."

import contextlib
import copy
import math
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import clip475.training.runs as runs
import clip475.training.steps as train_module
from clip475.core.config import LabConfig
from clip475.core.files import LabError
from clip475.models.joint import load_model
from clip475.training.batches import epoch_batches, prepare_data
from clip475.training.checkpoints import _checkpoint_files, _load_checkpoint
from clip475.training.runs import _check_run_folder, fit
from clip475.training.steps import (
    _model_to_evaluate,
    _set_training_mode,
    start_training,
    train_epoch,
    train_step,
)

BASE = LabConfig.from_preset(
    "tiny", train_images=64, val_images=16, epochs=2, batch_size=16, image_size=32, precision="fp32"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("CLIP475_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare_data(BASE, progress=False)


def one_step(config, train, keep_weights=True):
    state = start_training(config)
    if keep_weights:
        state.optimizer.step = lambda *a, **k: None
    _set_training_mode(state.model, config)
    pixels, texts, rows, text_rows = next(iter(epoch_batches(train, config, 0, state.process_group)))
    numbers = train_step(state, pixels, texts, rows, 1e-3, config, text_rows)
    return (
        state,
        numbers.tolist(),
        {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None},
    )


# ── options ──


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss": "siglip"},
        {"loss": "multi-positive", "captions_per_image": 3, "augment": "crop+flip+jitter"},
    ],
)
def test_gradient_caching_in_the_loop_gives_the_plain_gradient(data, fields):
    plain = one_step(BASE.replace(freeze_batchnorm=True, **fields), data[0])
    cached = one_step(BASE.replace(freeze_batchnorm=True, micro_batch=5, **fields), data[0])
    assert plain[1] == pytest.approx(cached[1], rel=1e-4) and plain[2].keys() == cached[2].keys()
    scale = max(g.abs().max() for g in plain[2].values())
    for name, g in plain[2].items():
        torch.testing.assert_close(cached[2][name], g, atol=2e-5 * scale.item(), rtol=1e-3)


def test_rates_of_the_backbone_and_its_stages(data):
    config = BASE.replace(backbone_rate=0.1, layer_decay=0.5, weight_decay=0.0)
    state, before = start_training(config), None
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    _set_training_mode(state.model, config)
    pixels, texts, rows, text_rows = next(iter(epoch_batches(data[0], config, 0, state.process_group)))
    train_step(state, pixels, texts, rows, 1e-3, config, text_rows)
    # AdamW's first step moves every weight by its learning rate, whatever the gradient
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in state.model.named_parameters()}
    prefix = "image_encoder.backbone."
    for name, rate in (
        ("image_encoder.head.0.weight", 1),
        (prefix + "layer4.0.conv1.weight", 0.1),
        (prefix + "layer3.0.conv1.weight", 0.05),
        (prefix + "layer1.0.conv1.weight", 0.0125),
        (prefix + "conv1.weight", 0.00625),
    ):
        assert moved[name] == pytest.approx(1e-3 * rate, rel=0.05), name


def test_the_average_is_that_of_weights_and_buffers(data):
    config = BASE.replace(ema_decay=0.75)
    state, expected = start_training(config), None

    def follow(state):
        nonlocal expected
        now = {
            k: v.detach().clone()
            for k, v in state.model.image_encoder.state_dict().items()
            if v.is_floating_point()
        }
        expected = now if expected is None else {k: 0.75 * v + 0.25 * now[k] for k, v in expected.items()}

    train_epoch(state, data[0], config, progress=False, after_step=follow)
    averaged = _model_to_evaluate(state).image_encoder.state_dict()
    assert any("running_var" in k for k in expected) and len(expected) > 30
    for k, v in expected.items():
        torch.testing.assert_close(averaged[k], v, atol=1e-5, rtol=1e-4)
    assert _model_to_evaluate(state).logit_scale.item() == state.model.logit_scale.item()


def test_frozen_statistics_stay_to_the_bit_and_weights_train(data):
    config = BASE.replace(freeze_batchnorm=True)
    state = start_training(config)
    before = copy.deepcopy(state.model.image_encoder.state_dict())
    train_epoch(state, data[0], config, progress=False)
    after = state.model.image_encoder.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert (
        not {k for k in changed if "running" in k or "num_batches" in k} and "backbone.bn1.weight" in changed
    )


def test_clipping_and_its_share(data):
    _, (_, norm, _), grads = one_step(BASE.replace(clip_grad_norm=0.5), data[0])
    assert norm > 0.5 and math.sqrt(
        sum(g.double().square().sum().item() for g in grads.values())
    ) == pytest.approx(0.5, rel=1e-4)
    state = start_training(BASE)
    row = train_epoch(state, data[0], BASE, progress=False)
    norms = sorted(r["gradient_norm"] for r in state.log)
    config = BASE.replace(clip_grad_norm=(norms[0] + norms[1]) / 2)
    state = start_training(config)
    share = train_epoch(state, data[0], config, progress=False)["clipped_steps"]
    assert (
        row["clipped_steps"] == 0
        and share == sum(r["gradient_norm"] > config.clip_grad_norm for r in state.log) / 4 > 0
    )


def test_compiling_is_asked_for_and_off_otherwise(data):
    with patch.object(torch, "compile", side_effect=lambda m: m) as compiler:
        start_training(BASE)
        assert not compiler.called
        state = start_training(BASE.replace(compile=True))
        assert compiler.call_args.args == (state.model.image_encoder,)


def test_nothing_is_read_from_the_device_between_two_readings(data):
    """The hot loop must not wait: no .item(), .tolist() or .cpu() on what a step computes, except when the
    log is read."""
    config, reads = BASE.replace(batch_size=8), []
    state = start_training(config)

    def watched(real):
        def read(self, *args):
            if self.is_floating_point():
                reads.append(state.step)  # ids are whole numbers, and never on the device
            return real(self, *args)

        return read

    with contextlib.ExitStack() as stack:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
            stack.enter_context(patch.object(torch.Tensor, name, watched(getattr(torch.Tensor, name))))
        train_epoch(state, data[0], config, progress=False)
    assert len(state.log) == 8 and set(reads) == {8}, sorted(set(reads))


# ── what a run keeps ──


def test_the_best_model_is_chosen_by_recall_not_by_loss(data, tmp_path):
    recalls = iter([0.6, 0.2, 0.4])
    weights = []
    state = fit(
        BASE.replace(epochs=3),
        *data,
        tmp_path / "run",
        measure=lambda e, v: {"i2t_R@1": (r := next(recalls)), "t2i_R@1": r},
        progress=False,
        watch=lambda s: weights.append({k: v.clone() for k, v in s.model.image_encoder.state_dict().items()}),
    )
    assert state.best == {"epoch": 1, "score": 1.2}
    kept = load_model(tmp_path / "run")[0].image_encoder.state_dict()
    assert all(torch.equal(v, weights[0][k]) for k, v in kept.items()) and not all(
        torch.equal(v, weights[2][k]) for k, v in kept.items()
    )
    losses = pd.read_csv(tmp_path / "run" / "metrics.csv").val_loss
    assert losses.idxmin() != 0  # by loss, another epoch would have won


def test_a_kill_between_checkpoint_and_the_rest_is_mended(data, tmp_path):
    class Killed(BaseException):
        "Stands for SIGKILL."

    def killed(*args):
        raise Killed

    with patch.object(runs, "write_text", killed), pytest.raises(Killed):
        fit(BASE, *data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.csv").exists() and len(_checkpoint_files(tmp_path / "run")) == 1
    state = fit(BASE, *data, tmp_path / "run", resume=True, progress=False)
    whole = fit(BASE, *data, tmp_path / "whole", progress=False)
    mine, theirs = (
        load_file(tmp_path / "run" / "model.safetensors"),
        load_file(tmp_path / "whole" / "model.safetensors"),
    )
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items()) and [
        r["val_loss"] for r in state.metrics
    ] == [r["val_loss"] for r in whole.metrics]


def test_a_diverged_run_leaves_its_last_good_checkpoint(data, tmp_path):
    "Weights that are not finite are never saved, and the message names what is left."
    config = BASE.replace(checkpoint_steps=1, epochs=3)
    real, calls = train_module.train_step, []

    def poisoned(state, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            state.model.image_encoder.head[0].weight.data[0, 0] = math.nan
        return real(state, *args, **kwargs)

    with (
        patch.object(train_module, "train_step", poisoned),
        pytest.raises(
            LabError, match=r"diverged at step 6: loss nan.*last good checkpoint is .*step-00000005.pt"
        ),
    ):
        fit(config, *data, tmp_path / "run", progress=False)
    state = _load_checkpoint(config, tmp_path / "run")
    assert state.step == 5 and all(v.isfinite().all() for v in state.model.state_dict().values())


def test_a_lack_of_memory_is_answered_with_what_to_try(data, tmp_path):
    def hungry(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with (
        patch.object(train_module, "train_step", hungry),
        pytest.raises(
            LabError,
            match="16 images at a time after step 0; in a new run.*micro_batch=8.*15 negatives.*batch_size=8",
        ),
    ):
        fit(BASE, *data, tmp_path / "run", progress=False)
    fit(
        BASE.replace(epochs=1, micro_batch=8), *data, tmp_path / "run", progress=False
    )  # nothing was kept, so the advice can be followed at once


def test_a_compiler_that_fails_is_told(data, tmp_path):
    from torch._dynamo.exc import TorchDynamoException  # a RuntimeError, as what torch says of memory is

    def failing(*args, **kwargs):
        raise TorchDynamoException("no C++ compiler")

    with (
        patch.object(train_module, "train_step", failing),
        pytest.raises(LabError, match="compiling the image tower failed.*leave compile false"),
    ):
        fit(BASE, *data, tmp_path / "run", progress=False)


def test_a_truncated_or_foreign_checkpoint_is_passed_over(data, tmp_path):
    config, said = BASE.replace(checkpoint_steps=3), []
    fit(config, *data, tmp_path / "run", progress=False)
    newest, before = _checkpoint_files(tmp_path / "run")
    content = newest.read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 100):
        newest.write_bytes(content[:cut])
        said.clear()
        assert (
            _load_checkpoint(config, tmp_path / "run", warn=said.append).step == int(before.stem[5:])
            and len(said) == 1
            and newest.name in said[0]
        )
    before.write_bytes(b"")
    with pytest.raises(LabError, match="no other in its folder"):
        _load_checkpoint(config, tmp_path / "run", warn=said.append)


def test_a_bit_that_flipped_and_a_checkpoint_of_another_run_are_passed_over(data, tmp_path):
    config, said = BASE.replace(checkpoint_steps=3), []
    fit(config, *data, tmp_path / "run", progress=False)
    newest, before = _checkpoint_files(tmp_path / "run")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of some weight
    newest.write_bytes(content)
    other = BASE.replace(seed=7)
    runs._save_checkpoint(start_training(other), other, tmp_path / "other")
    foreign = newest.with_name("step-00000099.pt")
    foreign.write_bytes((tmp_path / "other" / "checkpoint" / "step-00000000.pt").read_bytes())
    state = _load_checkpoint(config, tmp_path / "run", warn=said.append)
    assert (
        state.step == int(before.stem[5:])
        and len(said) == 2
        and "another seed" in said[0]
        and "not a whole checkpoint" in said[1]
    )
    assert _checkpoint_files(tmp_path / "run") == [
        before
    ]  # what was passed over takes no place among the last two


def test_killed_before_the_first_checkpoint(data, tmp_path):
    "The folder holds a configuration and nothing else: both a new run and --resume begin."
    for i, resume in enumerate((False, True)):
        run = tmp_path / f"run{i}"
        run.mkdir()
        BASE.save(run / "config.json")
        assert fit(BASE.replace(epochs=1), *data, run, resume=resume, progress=False).step == 4


def test_numbers_of_numpy_in_the_metrics_do_no_harm(data, tmp_path):
    fit(
        BASE,
        *data,
        tmp_path / "run",
        measure=lambda e, v: {"i2t_R@1": np.float64(0.5), "t2i_R@1": torch.tensor(0.25)},
        progress=False,
    )
    assert _load_checkpoint(BASE, tmp_path / "run").metrics[-1]["i2t_R@1"] == 0.5


def test_fp16_that_skips_every_step_is_stopped(data):
    config = BASE.replace(batch_size=2)
    state = start_training(config)
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state.model.image_encoder.head[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(LabError, match="no gradient of the last 20 steps was finite"):
        train_epoch(state, data[0], config, progress=False)


def test_loading_a_checkpoint_never_runs_code(data, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    torch.save({"format": 2, "trap": Trap()}, tmp_path / "run" / "checkpoint" / "step-00000001.pt")
    with pytest.raises(LabError, match="no other in its folder"):
        _load_checkpoint(BASE, tmp_path / "run", warn=lambda m: None)
    assert not (tmp_path / "trapped").exists()


def test_resuming_on_other_pictures_or_captions_is_refused(data, tmp_path):
    fit(BASE, *data, tmp_path / "run", progress=False)
    train, val = data
    pixels = np.array(train.pixels)
    pixels[3, 0, 0, 0] ^= 1
    changed = train_module.PreparedSplit(train.split, pixels, train.text_embeddings)
    with pytest.raises(LabError, match="train changed"):
        fit(BASE, changed, val, tmp_path / "run", resume=True, progress=False)
    fit(
        BASE.replace(data="another/place"), *data, tmp_path / "run", resume=True, progress=False
    )  # the same data elsewhere are the same data


def test_tensorboard_is_written_when_it_is_installed(data, tmp_path):
    pytest.importorskip("tensorboard")
    fit(BASE, *data, tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_folders_that_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="is a file"):
        _check_run_folder(tmp_path / "file")
    with pytest.raises(LabError, match="nothing can be written"):
        _check_run_folder(tmp_path / "file" / "below")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("")
    with pytest.raises(LabError, match="holds a run already"):
        _check_run_folder(tmp_path / "old")
    _check_run_folder(tmp_path / "old", resume=True)


def test_uniform_logits_give_ln_b_and_a_few_pairs_are_learned_by_heart(data):
    config, few = BASE.replace(batch_size=16), torch.arange(16)
    from clip475.training.loss import batch_loss

    same = torch.nn.functional.normalize(torch.ones(16, 8), dim=-1)
    for fields in ({}, {"loss": "multi-positive"}, {"label_smoothing": 0.2}):
        assert batch_loss(
            config.replace(**fields), same, same, torch.tensor(2.0), few, few
        ).item() == pytest.approx(math.log(16), abs=1e-5)
    state, first = start_training(config), data[0].split.first_caption[:16]
    losses = [
        train_step(
            state,
            torch.from_numpy(data[0].pixels[:16].copy()),
            data[0].text_embeddings[first],
            few,
            1e-3,
            config,
        )[0].item()
        for _ in range(25)
    ]
    assert losses[-1] < 0.05 < 2 < losses[0]
