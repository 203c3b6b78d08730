"""Four and eight processes against a simulation of them in one: the shuffle, the keys and the queue, to the bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from tiny_models import moco_config

from modeling_moco import MoCoModel

STEPS, N, SIZE = 4, 4, 32
pytestmark = pytest.mark.slow


def start(batch_norm: str) -> MoCoModel:
    """A model whose keys are not its queries."""
    torch.manual_seed(0)
    model = MoCoModel(moco_config(batch_norm=batch_norm)).train()
    with torch.no_grad():
        for parameter in [*model.encoder_k.parameters(), *model.projector_k.parameters()]:
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def images(ranks: int) -> torch.Tensor:
    """Views of all processes (steps, 2, R·N, 3, H, W)."""
    return torch.randn(STEPS, 2, ranks * N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def orders(ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(ranks * N, generator=generator) for _ in range(STEPS)]


def run(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch._C._set_mkldnn_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model = start("shuffle")
    model.given_orders = iter(orders(ranks))
    found = []
    for x_q, x_k in images(ranks):
        model.update_key_encoder()
        mine = slice(rank * N, rank * N + N)
        outputs = model(x_q[mine], x_k[mine])
        model.dictionary.enqueue(outputs.key_embeds)
        found.append({"logits": outputs.logits.detach(), "queue": model.dictionary.queue.clone()})
    torch.save({"steps": found, "statistics": model.encoder_k.bn1.running_var}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def simulate(ranks: int) -> tuple[list[dict], list[torch.Tensor]]:
    """What `ranks` processes compute, one after the other: logits of each, the queue, and the statistics of each."""
    models = [start("plain") for _ in range(ranks)]
    queue, place, steps = models[0].dictionary.queue.clone(), 0, []
    for (x_q, x_k), order in zip(images(ranks), orders(ranks), strict=True):
        parts = order.view(ranks, N).sort(dim=1).values
        keys = torch.empty(ranks * N, queue.shape[0])
        for model, part in zip(models, parts, strict=True):
            model.update_key_encoder()
            keys[part] = F.normalize(model.projector_k(model.encoder_k(x_k[part])), dim=1)
        logits = []
        for rank, model in enumerate(models):
            mine = slice(rank * N, rank * N + N)
            q = F.normalize(model.projector_q(model.encoder_q(x_q[mine])), dim=1)
            positive = (q * keys[mine]).sum(dim=1, keepdim=True)
            logits.append(torch.cat([positive, q @ queue], dim=1) / model.config.temperature)
        queue[:, place : place + ranks * N] = keys.T
        place = (place + ranks * N) % queue.shape[1]
        steps.append({"logits": logits, "queue": copy.deepcopy(queue)})
    return steps, [model.encoder_k.bn1.running_var for model in models]


@pytest.mark.parametrize("ranks", [4, 8])
def test_many_processes_are_their_simulation_in_one(ranks, tmp_path):
    run_ranks(run, (str(tmp_path), ranks), ranks)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    enabled = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        steps, statistics = simulate(ranks)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    for rank in range(ranks):
        assert torch.equal(found[rank]["statistics"], statistics[rank])
        for ours, simulated in zip(found[rank]["steps"], steps, strict=True):
            assert torch.equal(ours["queue"], simulated["queue"])
            torch.testing.assert_close(ours["logits"], simulated["logits"][rank], atol=2e-6, rtol=0)
