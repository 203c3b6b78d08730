"""Learning rates against loops of the official formulas in float64."""

import math

import pytest
import torch

from training.optimization.schedules import epoch_schedule, rates_in_words, recorded_rate, scaled_rate, warmup_schedule


def rates_of(schedule, steps: int, rate: float, *args) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler, rates = schedule(optimizer, *args), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def official_v3(rate: float, warmup: float, epochs: int, iters_per_epoch: int) -> list[float]:
    """adjust_learning_rate(epoch + i / iters_per_epoch) of facebookresearch/moco-v3 main_moco.py."""
    rates = []
    for epoch in range(epochs):
        for i in range(iters_per_epoch):
            now = epoch + i / iters_per_epoch
            if now < warmup:
                rates.append(rate * now / warmup)
            else:
                rates.append(rate * 0.5 * (1.0 + math.cos(math.pi * (now - warmup) / (epochs - warmup))))
    return rates


@pytest.mark.parametrize("milestones", [[120, 160], None], ids=["v1", "v2"])
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_the_rate_of_every_epoch_is_the_official_one(milestones, steps_per_epoch):
    rates = rates_of(epoch_schedule, 200 * steps_per_epoch, 0.03, steps_per_epoch, 200, milestones)
    for step, rate in enumerate(rates):
        epoch, official = step // steps_per_epoch, 0.03
        if milestones is None:
            official *= 0.5 * (1 + math.cos(math.pi * epoch / 200))
        else:
            for milestone in milestones:
                official *= 0.1 if epoch >= milestone else 1.0
        assert rate == pytest.approx(official, rel=1e-12), epoch


@pytest.mark.parametrize(
    ("rate", "warmup", "epochs", "steps"), [(9.6, 10, 100, 7), (2.4e-3, 40, 300, 3), (1.0, 0.5, 2, 5)]
)
def test_with_a_warmup_the_rate_of_every_step_is_that_of_moco_v3(rate, warmup, epochs, steps):
    ours = rates_of(warmup_schedule, epochs * steps, rate, steps, epochs * steps, warmup)
    assert ours == pytest.approx(official_v3(rate, warmup, epochs, steps), rel=1e-12, abs=1e-15 * rate)
    assert ours[0] == 0
    assert max(ours) <= rate


def test_a_run_of_some_steps_has_its_cosine_within_them():
    # 9 steps of 4 an epoch: a warm-up of 4, and a cosine of 5 that would be 0 in the tenth.
    expected = [0, 0.25, 0.5, 0.75] + [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    assert rates_of(warmup_schedule, 9, 1.0, 4, 9, 1.0) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("warmup", [2.25, 3.0])
def test_a_warmup_that_the_run_does_not_leave_goes_on_rising(warmup):
    expected = [step / (4 * warmup) for step in range(9)]
    assert rates_of(warmup_schedule, 9, 1.0, 4, 9, warmup) == pytest.approx(expected)


def test_milestones_count_from_the_start_of_the_warmup():
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates_of(warmup_schedule, 10, 1.0, 2, 10, 2.0, [3, 4]) == pytest.approx(expected)


def test_scaled_rates_are_those_of_the_papers():
    # SimCLR's two rules are equal at 4096 (google-research/simclr README); moco-v3 CONFIG.md, main_lincls.py.
    assert scaled_rate(0.3, "linear", 4096) == pytest.approx(4.8)
    assert scaled_rate(0.075, "sqrt", 4096) == pytest.approx(4.8)
    assert scaled_rate(0.6, "linear", 4096) == pytest.approx(9.6)
    assert scaled_rate(1.5e-4, "linear", 4096) == pytest.approx(2.4e-3)
    assert [scaled_rate(rate, "linear", 1024) for rate in (0.1, 3.0)] == pytest.approx([0.4, 12])
    assert scaled_rate(0.03, "none", 4096) == 0.03


def test_both_rates_are_said():
    assert rates_in_words([0.6], "linear", 4096) == "0.6 x 4096/256 = 9.6"
    assert rates_in_words([0.075], "sqrt", 4096) == "0.075 x sqrt(4096) = 4.8"
    assert rates_in_words([0.1, 3.0], "linear", 1024) == "0.1 3 x 1024/256 = 0.4 12"
    assert rates_in_words([0.03], "none", 4096) == "0.03"


def test_what_a_run_has_recorded_is_said_where_it_is_known():
    settings = {"learning_rate": 0.6, "learning_rate_scaling": "linear", "global_batch_size": 4096}
    assert recorded_rate(settings) == "0.6 x 4096/256 = 9.6"
    for change in (
        *({"learning_rate_scaling": scaling} for scaling in ("none", None, 3, "cube")),
        *({"global_batch_size": batch} for batch in (None, -1, "4096", 10**400)),
        *({"learning_rate": rate} for rate in (None, float("nan"), [0.6])),
    ):
        assert recorded_rate(settings | change) is None, change
