"""LARS against loops of both official formulas in float64, over a rate that changes."""

import copy
import math

import pytest
import torch

from training.optimization.lars import Lars

STEPS, WARMUP, DECAY, MOMENTUM, ETA = 20, 5, 0.1, 0.9, 0.001
SHAPES = {"conv": (4, 3, 3, 3), "linear": (6, 5), "token": (1, 1, 4), "bias": (6,), "scalar": (), "unused": (3, 2)}
FORMS = pytest.mark.parametrize("classic", [True, False], ids=["simclr", "v3"])


def rate_of(step: int) -> float:
    if step < WARMUP:
        return 4.8 * step / WARMUP
    return 4.8 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def parameters(dtype=torch.float64) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    start["zero"] = torch.zeros(2, 2, dtype=torch.float64)  # moves by its bare gradient at first
    start["conv"] = start["conv"].contiguous(memory_format=torch.channels_last)
    return {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in start.items()}


def set_gradients(named: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, p in named.items():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if name == "linear" and step in (0, 7):
            gradient.zero_()
        p.grad = None if name == "unused" else gradient


def ours(steps: range, named, optimizer) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        set_gradients(named, step)
        before = {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
        optimizer.step()
        for name, p in named.items():  # who clips or logs gradients afterwards sees them as they were
            assert p.grad is None or torch.equal(p.grad, before[name])


def official(classic: bool, weight_decay: float) -> dict[str, list[float]]:
    """Number by number: lars_optimizer.py of google-research/simclr (classic), optimizer.py of facebookresearch/moco-v3."""
    named = parameters()
    weights = {name: p.detach().flatten().tolist() for name, p in named.items()}
    buffers = {name: [0.0] * len(weight) for name, weight in weights.items()}
    for step in range(STEPS):
        set_gradients(named, step)
        for name, p in named.items():
            if p.grad is None:
                continue
            w, g, ratio = weights[name], p.grad.flatten().tolist(), 1.0
            if p.ndim > 1:
                g = [x + weight_decay * y for x, y in zip(g, w, strict=True)]
                w_norm, g_norm = (math.sqrt(sum(x * x for x in some)) for some in (w, g))
                ratio = ETA * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            for i in range(len(w)):
                if classic:
                    buffers[name][i] = MOMENTUM * buffers[name][i] + rate_of(step) * ratio * g[i]
                    w[i] -= buffers[name][i]
                else:
                    buffers[name][i] = MOMENTUM * buffers[name][i] + ratio * g[i]
                    w[i] -= rate_of(step) * buffers[name][i]
    return weights


@FORMS
@pytest.mark.parametrize("weight_decay", [DECAY, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_both_forms_are_the_official_ones(classic, weight_decay, dtype, tolerance):
    named = parameters(dtype)
    ours(range(STEPS), named, Lars(named.values(), lr=0, weight_decay=weight_decay, classic=classic))
    for name, expected in official(classic, weight_decay).items():
        moved = torch.tensor(expected, dtype=torch.float64).reshape(named[name].shape)
        torch.testing.assert_close(named[name].detach().double(), moved, rtol=tolerance, atol=tolerance, msg=name)


def test_the_forms_part_when_the_rate_changes_and_are_one_while_it_does_not():
    changing = [official(classic, DECAY) for classic in (True, False)]
    for name in SHAPES.keys() - {"unused"}:
        assert max(abs(a - b) for a, b in zip(*(x[name] for x in changing), strict=True)) > 1e-4, name
    constant = []
    for classic in (True, False):
        named = parameters()
        optimizer = Lars(named.values(), lr=0.5, weight_decay=DECAY, classic=classic)
        for step in range(STEPS):
            set_gradients(named, step)
            optimizer.step()
        constant.append(named)
    for name in SHAPES:
        torch.testing.assert_close(constant[0][name], constant[1][name], rtol=1e-12, atol=1e-12)


@FORMS
def test_it_goes_on_from_a_saved_state_to_the_bit(classic, tmp_path):
    settings = {"lr": 0, "weight_decay": DECAY, "classic": classic}
    whole = parameters(torch.float32)
    ours(range(STEPS), whole, Lars(whole.values(), **settings))
    half = parameters(torch.float32)
    optimizer = Lars(half.values(), **settings)
    ours(range(STEPS // 2), half, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    rest = {name: torch.nn.Parameter(p.detach().clone()) for name, p in half.items()}
    resumed = Lars(rest.values(), lr=1, classic=not classic)  # the saved state says how it goes on
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    ours(range(STEPS // 2, STEPS), rest, resumed)
    for name, p in whole.items():
        assert torch.equal(p, rest[name]), name


def test_without_gradients_nothing_moves_and_nothing_is_kept():
    named = parameters()
    start = copy.deepcopy(named)
    optimizer = Lars([{"params": list(named.values())}, {"params": []}], lr=1.0, weight_decay=DECAY)
    optimizer.step()
    assert all(torch.equal(p, start[name]) for name, p in named.items())
    assert not optimizer.state_dict()["state"]


def test_a_scaled_loss_gives_the_same_step_and_an_overflow_none():
    weights = []
    for scale in (1.0, 1024.0):
        p = parameters(torch.float32)["linear"]
        optimizer, scaler = Lars([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        scaler.scale((p * torch.arange(30.0).reshape(6, 5)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(p.detach().clone())
        if scale > 1:
            optimizer.zero_grad()
            scaler.scale(p.sum() * math.inf).backward()
            scaler.step(optimizer)
            assert torch.equal(p, weights[-1])
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_number_below_zero_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be at least 0"):
        Lars([torch.nn.Parameter(torch.zeros(1))], **{"lr": 0.1} | {name: value})
