"""Gradients of several processes, which share a batch, against those of one process with all of it.

The losses would be equal with a gather that keeps the gradients of its own process, as several projects have had it: the
gradients are not.
"""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from methods import BANK, METHODS, method_config
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from modeling_moco import MoCoModel, distributed_moco
from modeling_moco.distributed_moco import local_slice

IMAGES = 16  # of all processes
# Without BatchNorm in the heads: a CPU has no synchronised one, and each process would have statistics of its own.
HEAD = {"projection_head": "mlp", "prediction_head": "none", "projection_layers": 2}
KINDS = {name: (name, {}) for name in METHODS} | {
    "queue_shuffled": ("queue", {"batch_norm": "shuffle"}),
    "end_to_end_shuffled": ("end_to_end", {"batch_norm": "shuffle"}),
    "end_to_end_symmetric": ("end_to_end", {"symmetric_loss": True}),
}
SPOILED = {"end_to_end", "end_to_end_shuffled", "end_to_end_symmetric", "simclr"}  # their keys have gradients


def own_rows_alone(ctx, grad):
    return grad.contiguous()[local_slice(len(grad) // dist.get_world_size())]


def steps(wrap, rows: slice) -> dict:
    """Loss, gradients and dictionary of one step of each method, on these rows of the batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, IMAGES, 3, 32, 32, generator=generator)[:, rows]
    index = torch.randperm(BANK, generator=generator)[:IMAGES][rows]
    results = {}
    for kind, (method, changes) in KINDS.items():
        torch.manual_seed(0)
        vit = {"architecture": "test_vit", "model_args": {"img_size": 32}}  # has no BatchNorm
        model = MoCoModel(method_config(method, **vit, **HEAD | changes)).train()
        model.shuffle_generator.manual_seed(7)
        model.dictionary.generator = torch.Generator().manual_seed(3)
        run = wrap(model)
        outputs = run(x[0], index=index) if method == "bank" else run(x[0], x[1])
        outputs.loss.backward()
        model.dictionary.enqueue(outputs.key_embeds, outputs.key_index)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[kind] = {
            "loss": outputs.loss.detach(),
            "gradient": gradient,
            "state": dict(model.dictionary.named_buffers()),
        }
    return results


def rank_steps(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # as in MoCoTrainer
    mine = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    results = {}
    for name, backward in (("ours", distributed_moco._Gather.backward), ("spoiled", staticmethod(own_rows_alone))):
        distributed_moco._Gather.backward = backward
        results[name] = steps(lambda model: DistributedDataParallel(model, broadcast_buffers=False), mine)
        for result in results[name].values():
            dist.all_reduce(result["loss"])
            result["loss"] /= ranks
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """What one process gets, and each of several."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_steps, (str(folder), request.param), request.param)
    return steps(lambda model: model, slice(None)), [torch.load(folder / f"{r}.pt") for r in range(request.param)]


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_have_the_gradients_of_one(results, kind):
    one, ranks = results
    for rank in ranks:
        ours = rank["ours"][kind]
        torch.testing.assert_close(ours["loss"], one[kind]["loss"], rtol=2e-6, atol=0)
        difference = (ours["gradient"] - one[kind]["gradient"]).norm() / one[kind]["gradient"].norm()
        print(kind, "relative difference of the gradient", difference.item())
        assert difference < 1e-5
        for name, tensor in ours["state"].items():
            assert torch.equal(tensor, ranks[0]["ours"][kind]["state"][name])  # dictionaries stay equal
            torch.testing.assert_close(tensor, one[kind]["state"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_own_process_alone_are_seen_in_the_gradients_and_not_in_the_loss(results, kind):
    one, ranks = results
    spoiled = ranks[0]["spoiled"][kind]
    torch.testing.assert_close(spoiled["loss"], one[kind]["loss"], rtol=2e-6, atol=0)
    difference = (spoiled["gradient"] - one[kind]["gradient"]).norm() / one[kind]["gradient"].norm()
    print(kind, "relative difference of the gradient", difference.item())
    assert (difference > 0.2) == (kind in SPOILED)
