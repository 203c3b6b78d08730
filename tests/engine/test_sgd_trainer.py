"""Optimizers, learning rates and warm-ups as a run has them, and what is refused of them before it begins."""

import math

import pytest
import torch
from tiny_trainer import BATCH, StopAt, build, image_rows
from transformers import TrainerCallback

from training.engine.sgd_trainer import SGDTrainingArguments
from training.optimization.lars import Lars


@pytest.fixture(scope="module")
def rows():
    return image_rows()


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def arguments(tmp_path, **kwargs) -> SGDTrainingArguments:
    return SGDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **kwargs)


def official(rate: float, warmup: float, epochs: float, steps_per_epoch: int, steps: int) -> list[float]:
    rates = []
    for step in range(steps):
        epoch = step / steps_per_epoch
        rising, falling = epoch / warmup, 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        rates.append(rate * (rising if epoch < warmup else falling))
    return rates


@pytest.mark.parametrize(
    ("stream", "length", "epochs", "steps"),
    [
        (False, {"max_steps": 7}, 7 / 3, 7),
        pytest.param(True, {"num_train_epochs": 3}, 3, 9, marks=pytest.mark.slow),
    ],
)
def test_the_rate_is_scaled_by_the_global_batch_and_rises_in_every_step(rows, tmp_path, stream, length, epochs, steps):
    # 6 batches an epoch, two for a step: a global batch of 8 and 3 steps an epoch.
    settings = {"learning_rate": 3.2, "learning_rate_scaling": "linear", "gradient_accumulation_steps": 2}
    rates = Rates()
    trainer = build(rows, tmp_path, None, rates, stream, warmup_epochs=1.5, **settings | length)
    trainer.train()
    assert rates.seen == pytest.approx(official(3.2 * 2 * BATCH / 256, 1.5, epochs, 3, steps), rel=1e-12)
    assert trainer.args.optimization == "3.2 x 8/256 = 0.1 after a warm-up of 1.5 epochs"


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "form"), [(False, "classic=true"), (True, "classic=false")], ids=["map", "stream"])
def test_a_run_by_lars_that_was_stopped_goes_on_to_the_bit(rows, tmp_path, stream, form):
    settings = {"optim": "lars", "optim_args": f"momentum=0.9,{form}", "learning_rate": 1.0, "bf16": True}
    settings |= {"learning_rate_scaling": "sqrt", "warmup_epochs": 0.5, "weight_decay": 1e-4, "max_steps": 4}
    whole = build(rows, tmp_path / "whole", stream=stream, **settings)
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    settings |= {"stream": stream, "save_strategy": "steps", "save_steps": 2}
    build(rows, tmp_path / "stopped", callback=StopAt(2), **settings).train()  # within the warm-up
    resumed = build(rows, tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
        assert tensor.isfinite().all()
    assert not any(torch.equal(p, start[name]) for name, p in whole.model.named_parameters())
    ours, theirs = (trainer.optimizer.state_dict() for trainer in (whole, resumed))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in ours["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs["state"][number]["momentum_buffer"])
    saved = torch.load(tmp_path / "stopped" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (saved.optim, saved.optim_args) == ("lars", f"momentum=0.9,{form}")


def test_lars_leaves_what_has_one_dimension_without_decay_and_ratio(rows, tmp_path):
    class First(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                pairs = {name: p for name, p in model.named_parameters() if p.requires_grad}
                self.expected = {name: _moved(p.detach(), p.grad) for name, p in pairs.items()}

    def _moved(p, g):
        if p.ndim > 1:
            g = g + 0.1 * p
            g = 0.001 * g * p.double().norm() / g.double().norm()
        return p - 0.5 * g

    first = First()
    settings = {"optim": "lars", "learning_rate": 0.5, "weight_decay": 0.1, "max_steps": 1}
    trainer = build(rows, tmp_path, None, first, **settings)
    trainer.train()
    for name, expected in first.expected.items():
        torch.testing.assert_close(trainer.model.get_parameter(name).detach(), expected.float(), msg=name)
    assert isinstance(trainer.optimizer.optimizer, Lars)


def test_adamw_decays_everything_and_has_its_own_defaults(rows, tmp_path):
    trainer = build(rows, tmp_path, optim="adamw_torch", learning_rate=1.5e-4, weight_decay=0.1)
    trainer.create_optimizer()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.5e-4, weight_decay=0.1).param_groups[0]
    group = next(group for group in trainer.optimizer.param_groups if group["params"])
    assert {key: group[key] for key in group if key != "params"} == {
        key: reference[key] for key in group if key != "params"
    }
    assert {id(p) for p in group["params"]} == {id(p) for p in trained}
    assert trainer.args.optim_args is None


def test_the_defaults_are_those_of_v1_and_v2(tmp_path):
    args = arguments(tmp_path)
    assert (args.optim, args.optim_args, args.learning_rate_scaling, args.warmup_epochs) == (
        "sgd",
        "momentum=0.9",
        "none",
        0,
    )
    assert args.scaled(0.03) == 0.03


REFUSED = [
    ({"optim": "larz"}, r"optim ('larz') is unknown: did you mean 'lars'?"),
    ({"optim": "lars", "optim_args": "momentun=0.9"}, "lars has no argument 'momentun': did you mean 'momentum'?"),
    ({"optim": "lars", "optim_args": "momentum"}, "must be name=value, with commas between several"),
    ({"optim": "lars", "optim_args": "momentum=0.9,"}, "must be name=value, with commas between several"),
    ({"optim": "lars", "optim_args": "classic=yes"}, "classic ('yes') must be true or false"),
    ({"optim": "lars", "optim_args": "momentum=x"}, "momentum ('x') must be a number of at least 0"),
    ({"optim": "lars", "optim_args": "momentum=inf"}, "momentum ('inf') must be a number of at least 0"),
    ({"optim": "lars", "optim_args": "weight_decay=1"}, "lars has no argument 'weight_decay': pass --weight_decay"),
    ({"optim_args": "classic=true"}, "sgd has no argument 'classic'"),
    ({"optim_args": "nesterov=true"}, "nesterov needs a momentum above 0 and no dampening"),
    ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "leave it out, or pass --adam_beta1"),
    ({"learning_rate_scaling": "cube"}, "learning_rate_scaling ('cube') must be none, linear, sqrt"),
    ({"warmup_epochs": -1}, "warmup_epochs (-1) must be at least 0"),
    ({"warmup_epochs": 2, "warmup_steps": 5}, "warmup_steps (5) does not go with warmup_epochs"),
    ({"warmup_epochs": 3, "num_train_epochs": 3}, "warmup_epochs (3) must be below num_train_epochs (3)"),
    ({"warmup_epochs": 2, "lr_scheduler_type": "linear"}, "and not before linear: pass --warmup_steps"),
    ({"lr_milestones": [1], "warmup_steps": 5}, "warmup_steps (5) does not go with lr_milestones"),
    ({"learning_rate": -1}, "learning_rate (-1) must be a number of at least 0"),
    ({"learning_rate": math.nan}, "learning_rate (nan) must be a number of at least 0"),
    ({"weight_decay": math.inf}, "weight_decay (inf) must be a number of at least 0"),
    ({"num_train_epochs": math.inf}, "num_train_epochs (inf) must be a number above 0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps (0) must be a number of at least 1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size (0) must be a number of at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size (0) must be a number of at least 1"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers (-1) must be a number of at least 0"),
    ({"save_strategy": "steps", "save_steps": 0}, "save_steps (0) must be above 0: pass --save_strategy no"),
    ({"lr_milestones": [1], "lr_scheduler_type": "linear"}, "(linear) and lr_milestones (1) are two schedules"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, settings, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        arguments(tmp_path, **settings)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_short_run_of_a_recipe_with_a_warmup_is_allowed(tmp_path):
    assert arguments(tmp_path, warmup_epochs=10, max_steps=2, num_train_epochs=1).warmup_epochs == 10


@pytest.mark.parametrize("steps", [7, 12], ids=["inside an epoch", "at the end of one"])
def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_further_step(rows, tmp_path, steps):
    """transformers takes one at every restart, where the end lies inside an epoch."""
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 100}
    whole = build(rows, tmp_path, **settings)
    whole.train()
    numbers = torch.get_rng_state()
    for _ in range(2):
        again = build(rows, tmp_path, **settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == steps
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name
        assert torch.equal(torch.get_rng_state(), numbers)  # with which the rest of a command goes on


@pytest.mark.parametrize("steps", [7, 12], ids=["inside an epoch", "at the end of one"])
def test_the_last_evaluation_is_made_up_for(rows, tmp_path, steps):
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "epoch"}
    whole, again = build(rows, tmp_path, **settings), build(rows, tmp_path, **settings)
    whole.train()
    again.train(resume_from_checkpoint=True)  # the checkpoint is of the step before the evaluation
    histories = [one.state.log_history for one in (whole, again)]
    first, second = ([e for e in history if "eval_contrast_top1" in e and e["step"] == steps] for history in histories)
    assert len(first) == 1
    assert [entry["eval_contrast_top1"] for entry in second] == [entry["eval_contrast_top1"] for entry in first]
