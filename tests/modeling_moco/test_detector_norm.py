"""BatchNorm of detectors: shared over processes as detectron2 shares it, frozen, or plain."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_detectors import batch, detector, rcnn_config
from tiny_models import assert_equal
from torch import nn

from modeling_moco import MoCoForObjectDetection
from modeling_moco.distributed_moco import FrozenBatchNorm2d, SyncBatchNorm2d, set_fine_tuned_norm
from training.engine.results import encoder_digest

RANKS = 2


def norms(model, kind=nn.BatchNorm2d):
    return [module for module in model.modules() if isinstance(module, kind)]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), SyncBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), SyncBatchNorm2d(4)]
    for layer in (layers[1], layers[4]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).double()


def data():
    torch.manual_seed(1)
    images = torch.randn(4, 3, 9, 9) + torch.arange(4.0).view(4, 1, 1, 1) / 4  # processes have other means
    return images.double(), torch.randn(4, 4, 5, 5).double()


def loss_of(outputs, target):
    return ((outputs * target).mean(dim=(1, 2, 3)) + (outputs**3).mean(dim=(1, 2, 3))).sum()


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    net, (images, target) = network(), data()
    images, target = (x.chunk(RANKS)[rank].clone() for x in (images, target))
    outputs = net(images.requires_grad_())
    loss_of(outputs, target).backward()
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
    gradients = [parameter.grad for parameter in net.parameters()]
    uneven = network()
    uneven(data()[0][: 1 + 2 * rank])  # one image here and three there
    evaluated = net.eval()(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network().float()(images.float())
    model = detector(anchor_sizes=(16, 32))
    inputs = batch(objects=(2, 1))
    mine = {k: v[rank : rank + 1] for k, v in inputs.items()}
    model.train()(**mine).loss.backward()
    torch.save(
        {
            "outputs": outputs.detach(),
            "images": images.grad,
            "gradients": gradients,
            "state": net.state_dict(),
            "evaluated": evaluated.detach(),
            "uneven": uneven[1].state_dict(),
            "half": half.detach(),
            "detector": model.state_dict(),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch_but_for_the_biased_variance(tmp_path):
    run_ranks(_run_rank, (str(tmp_path),), RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    net, (images, target) = network(), data()
    outputs = net(images.requires_grad_())
    loss_of(outputs, target).backward()
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(torch.cat([rank["outputs"] for rank in ranks]), outputs.detach(), **close)
    torch.testing.assert_close(torch.cat([rank["images"] for rank in ranks]), images.grad, **close)
    for rank in ranks:
        for ours, parameter in zip(rank["gradients"], net.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, **close)
        for i, values in ((1, 4 * 7 * 7), (4, 4 * 5 * 5)):
            state = {
                name: rank["state"][f"{i}.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked")
            }
            torch.testing.assert_close(state["running_mean"], net[i].running_mean, **close)
            # torch keeps n / (n - 1) of the variance, detectron2 the variance.
            biased = 0.9 + (net[i].running_var - 0.9) * (values - 1) / values
            torch.testing.assert_close(state["running_var"], biased, **close)
            assert not torch.allclose(state["running_var"], net[i].running_var, atol=1e-6, rtol=1e-6)
            assert state["num_batches_tracked"] == 1
        assert rank["half"].dtype == torch.bfloat16
        assert (rank["half"] - rank["outputs"]).abs().mean() < 0.02
        # Processes count the same, though one has a third of the images.
        maps = network()[0](data()[0]).detach()
        means = [maps[: 1 + 2 * r].mean(dim=(0, 2, 3)) for r in range(RANKS)]
        torch.testing.assert_close(rank["uneven"]["running_mean"], 0.1 * (means[0] + means[1]) / 2, **close)
    reference = network()
    reference.load_state_dict(ranks[0]["state"])
    torch.testing.assert_close(ranks[0]["evaluated"], reference.eval()(images[:2]).detach(), **close)
    for name, tensor in ranks[0]["detector"].items():
        if "running" in name:  # parameters have no step
            assert torch.equal(tensor, ranks[1]["detector"][name]), name


def test_one_process_is_torchs_own():
    net, (images, _) = network(), data()
    plain = network()
    for i in (1, 4):
        plain[i] = nn.BatchNorm2d(net[i].num_features, dtype=torch.float64)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(images), plain(images))
    assert_equal(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize("mode", ["sync", "plain", "frozen"])
def test_the_mode_holds_for_every_norm_and_changes_no_name(mode):
    model = detector(detector_norm=mode)
    kinds = {type(norm) for norm in norms(model)}
    assert kinds == {{"sync": SyncBatchNorm2d, "plain": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}[mode]}
    assert len(norms(model)) > 10
    plain = detector(detector_norm="plain")
    assert_equal(model.state_dict(), plain.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())  # the digest by which an encoder is known depends on it
    assert encoder_digest(model.moco) == encoder_digest(plain.moco)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_frozen_stays_in_training_and_the_rest_learns(loaded, tmp_path):
    model = detector(detector_norm="plain").train()
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    if loaded:
        model.save_pretrained(tmp_path)
        frozen = MoCoForObjectDetection.from_pretrained(tmp_path, detector_norm="frozen").train()
    else:
        frozen = detector(detector_norm="frozen").train()
        frozen.load_state_dict(model.state_dict())
    inputs, before = batch(), {n: t.clone() for n, t in frozen.state_dict().items()}
    images = inputs["pixel_values"]
    torch.testing.assert_close(
        frozen._features(images, hidden=False)[0], model.eval()._features(images, hidden=False)[0]
    )
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    frozen(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in frozen.parameters())
    optimizer.step()
    of_norms = {
        f"{n}.{t}" for n, m in frozen.named_modules() if isinstance(m, FrozenBatchNorm2d) for t in m.state_dict()
    }
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in of_norms), name


def test_a_norm_of_another_kind_is_refused_unless_plain():
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))
    for mode in ("sync", "frozen"):
        with pytest.raises(
            ValueError, match=r"handles nn.BatchNorm2d only, but test_resnet has BatchNorm1d at '1': choose"
        ):
            set_fine_tuned_norm(other, rcnn_config(detector_norm=mode), "detector_norm")
    set_fine_tuned_norm(other, rcnn_config(detector_norm="plain"), "detector_norm")
