"""Every method under the one trainer: trained, stopped and continued, and what is refused."""

import math
import re

import pytest
import torch
from methods import METHODS, method_config
from tiny_trainer import IMAGES, StopAt, build, image_rows

from modeling_moco import MoCoForImageClassification, MoCoModel
from training.trainer import MoCoTrainingArguments

STEPS = 12  # two epochs of six batches
KEY_ENCODERS = {"queue", "queue_symmetric", "moco_v3"}


@pytest.fixture(scope="module")
def rows():
    return image_rows()


def model_of(method: str, **changes) -> MoCoModel:
    torch.manual_seed(0)
    sizes = {"bank_size": IMAGES, "queue_size": 16}
    return MoCoModel(method_config(method, **sizes | changes))


def options_of(method: str) -> dict:
    return {"key_momentum_schedule": "cosine", "optim": "lars"} if method == "moco_v3" else {}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_and_continued_run_ends_as_an_uninterrupted_one_to_the_bit(rows, tmp_path, method, stream):
    options = {"stream": stream, "save_strategy": "steps", "save_steps": 5} | options_of(method)
    whole = build(rows, tmp_path / "whole", model_of(method), **options)
    whole.train()
    build(rows, tmp_path / "parts", model_of(method), StopAt(5), **options).train()
    continued = build(rows, tmp_path / "parts", model_of(method), **options)
    continued.train(resume_from_checkpoint=True)
    assert continued.state.global_step == STEPS
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, continued)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_logs_what_its_method_has_and_its_encoder_classifies(rows, tmp_path, method):
    trainer = build(rows, tmp_path, model_of(method), num_train_epochs=1, eval_strategy="epoch")
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x][-1]
    assert all(math.isfinite(value) for value in logged.values())
    assert ("key_drift" in logged) == (method in KEY_ENCODERS)
    assert ("queue_age" in logged) == method.startswith("queue")
    assert logged.get("negatives") == {"end_to_end": 3, "moco_v3": 3, "simclr": 6}.get(method)
    moved = {
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert moved == before.keys()
    trainer.save_model(str(tmp_path / "model"))
    classifier = MoCoForImageClassification.from_pretrained(tmp_path / "model")
    assert classifier(torch.randn(2, 3, 32, 32)).logits.shape == (2, 2)


@pytest.mark.parametrize("kind", ["map", "stream", "memory"])
def test_a_bank_that_is_encoded_has_a_key_of_every_image_before_the_first_step(rows, tmp_path, kind):
    trainer = build(
        rows, tmp_path, model_of("bank"), stream=kind == "stream", memory=kind == "memory", bank_start="encode"
    )
    random = trainer.model.dictionary.bank.clone()
    trainer._fill_dictionary()
    bank = trainer.model.dictionary.bank
    same = (bank == random).all(dim=1).sum().item()
    assert same == (IMAGES % 4 if kind == "stream" else 0)  # a stream leaves out less than a batch
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(IMAGES))
    again = build(
        rows, tmp_path, model_of("bank"), stream=kind == "stream", memory=kind == "memory", bank_start="encode"
    )
    again._fill_dictionary()
    assert torch.equal(again.model.dictionary.bank, bank)


def test_each_step_moves_the_keys_of_its_own_images(rows, tmp_path):
    trainer = build(rows, tmp_path, model_of("bank"), max_steps=1)
    before, seen = trainer.model.dictionary.bank.clone(), []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["index"]), with_kwargs=True
    )
    trainer.train()
    moved = (trainer.model.dictionary.bank != before).any(dim=1).nonzero()[:, 0]
    assert moved.tolist() == sorted(seen[0].tolist())
    assert len(moved) == 4


def test_the_momentum_of_moco_v3_rises_to_one_by_a_cosine(rows, tmp_path):
    args = MoCoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, key_momentum_schedule="cosine")
    for epoch in (0, 1.5, 50, 99.9, 100):  # main_moco.py of moco-v3, for 100 epochs
        assert args.key_momentum(0.99, epoch / 100) == 1.0 - 0.5 * (1.0 + math.cos(math.pi * epoch / 100)) * (
            1.0 - 0.99
        )
    asked = []
    trainer = build(rows, tmp_path, model_of("moco_v3"), key_momentum_schedule="cosine")
    update = trainer.model.update_key_encoder
    trainer.model.update_key_encoder = lambda momentum: asked.append(momentum) or update(momentum)
    trainer.train()
    assert asked == [args.key_momentum(0.999, step / STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "simclr",
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps (2) must be 1 for dictionary='batch_both_views'",
        ),
        ("end_to_end", {"queue_start": "encode"}, "queue_start (encode) is for a queue, not for a batch"),
        ("queue", {"bank_start": "encode"}, "bank_start (encode) is for a bank, not for a queue"),
        (
            "simclr",
            {"key_momentum_schedule": "cosine"},
            "key_momentum_schedule (cosine) is for key_encoder='momentum', not for 'none'",
        ),
        ("end_to_end", {"per_device_train_batch_size": 1}, "leaves no negatives in the batch"),
    ],
)
def test_settings_that_a_method_has_no_use_for_are_refused(rows, tmp_path, method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(rows, tmp_path, model_of(method), **options)


def test_a_bank_of_another_dataset_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"bank_size \(25\) is not the number of images \(26\)"):
        build(rows, tmp_path, model_of("bank", bank_size=25))
