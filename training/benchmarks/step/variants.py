"""A training step, the encoders alone, and a step in the style of the official code.

All variants start from the same weights and see the same images:

- encoder only is the limit: forward and backward of query encoder and projector, forward of key encoder and projector.
- this project: a step of `MoCoTrainer` from uint8 views, with momentum update, contrast accuracy, gradient norm, SGD and
  the queue.
- this project, replayed, on a GPU of NVIDIA: the same, its forward and backward passes as one CUDA graph (`cuda_graph`).
- official style: the same step with the order and the operations of the official code (NCHW, one parameter at a time, joined
  logits, a copy of the queue, numbers read from the device), from normalised images. It is never compiled.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modeling_moco import MoCoConfig, MoCoModel

from ...optimization.cuda_graph import StepGraph
from ...trainer import STATISTICS, VIEWS, contrast_statistics
from ..measure import Benchmark, PeakMemory, in_own_process, time_rounds

Step = Callable[[], Any]
SGD: dict[str, Any] = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}


def encoder_only(model: MoCoModel, views: torch.Tensor, precision: str, compiled: bool) -> Step:
    x_q, x_k = (model.normalize(x) for x in views)
    parameters = [*model.encoder_q.parameters(), *model.projector_q.parameters()]
    encoders = _Encoders(model)
    forward = torch.compile(encoders) if compiled else encoders

    def step() -> None:
        with _autocast(x_q.device, precision):
            q, _ = forward(x_q, x_k)
        q.backward(torch.ones_like(q))
        for parameter in parameters:
            parameter.grad = None

    return step


class _Encoders(nn.Module):
    def __init__(self, model: MoCoModel):
        super().__init__()
        self.model = model

    def forward(self, x_q: torch.Tensor, x_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.model.projector_q(self.model.encoder_q(x_q))
        with torch.no_grad():
            return q, self.model.projector_k(self.model.encoder_k(x_k))


def this_project(model: MoCoModel, views: torch.Tensor, precision: str, compiled: bool, graph: bool = False) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    batch = dict(zip(VIEWS, views, strict=True))
    return training_step(model, batch, optimizer, precision, compiled, graph)


def replayed(model: MoCoModel, views: torch.Tensor, precision: str, compiled: bool) -> Step:
    return this_project(model, views, precision, compiled, graph=True)


def training_step(
    model: MoCoModel,
    batch: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    precision: str,
    compiled: bool = False,
    graph: bool = False,
) -> Step:
    """What `MoCoTrainer` does with a batch that is on the device, without accelerate; with `graph` as `cuda_graph` does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    n, device = len(batch["pixel_values"]), batch["pixel_values"].device
    sums = torch.zeros(len(STATISTICS), device=device)
    forward = torch.compile(model) if compiled else model

    def forward_and_backward(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with _autocast(device, precision):
            outputs = forward(**batch)
        statistics = contrast_statistics(outputs.logits, outputs.query_embeds[:n], model.config.temperature)
        outputs.loss.backward()
        model.dictionary.enqueue(outputs.key_embeds, outputs.key_index)
        return outputs.loss.detach(), statistics

    gradients = StepGraph(model, forward_and_backward) if graph else forward_and_backward

    def step() -> torch.Tensor:
        model.update_key_encoder()
        loss, statistics = gradients(batch)
        sums.add_(statistics)
        nn.utils.clip_grad_norm_(parameters, float("inf"))  # Trainer logs the norm
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def official_style(model: MoCoModel, views: torch.Tensor, precision: str, compiled: bool) -> Step:
    model.to(memory_format=torch.contiguous_format)
    x_q, x_k = (model.normalize(x).contiguous() for x in views)
    encoder_q = nn.Sequential(model.encoder_q, model.projector_q)
    encoder_k = nn.Sequential(model.encoder_k, model.projector_k)
    queue, pointer = model.dictionary.queue, model.dictionary.queue_ptr
    m, n = model.config.key_momentum, len(x_q)
    optimizer = torch.optim.SGD(encoder_q.parameters(), **SGD)

    @torch.no_grad()
    def encode_keys() -> torch.Tensor:
        for p_q, p_k in zip(encoder_q.parameters(), encoder_k.parameters(), strict=True):
            p_k.data = m * p_k.data + (1 - m) * p_q.data
        order = torch.randperm(n, device=x_k.device)
        keys = F.normalize(encoder_k(x_k[order]), dim=1)
        return keys[torch.argsort(order)]

    @torch.no_grad()
    def enqueue(keys: torch.Tensor) -> None:
        start = int(pointer)
        queue[:, start : start + n] = keys.T
        pointer[0] = (start + n) % queue.shape[1]

    def step() -> None:
        with _autocast(x_q.device, precision):
            q = F.normalize(encoder_q(x_q), dim=1)
            k = encode_keys()
            l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
            l_neg = torch.einsum("nc,ck->nk", q, queue.clone().detach())
            logits = torch.cat([l_pos, l_neg], dim=1) / model.config.temperature
            labels = torch.zeros(n, dtype=torch.long, device=x_q.device)
            loss = F.cross_entropy(logits, labels)
        enqueue(k)
        found = logits.topk(5, dim=1).indices == labels[:, None]
        _ = loss.item(), found[:, :1].sum().item(), found.sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


VARIANTS: dict[str, Callable[[MoCoModel, torch.Tensor, str, bool], Step]] = {
    "encoder only": encoder_only,
    "this project": this_project,
    "official style": official_style,
}
if torch.cuda.is_available():
    VARIANTS["this project, replayed"] = replayed


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def build_steps(names: list[str], args: argparse.Namespace) -> dict[str, Step]:
    """A step of each of these variants, from the same weights, on two views of random pixels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = MoCoConfig(architecture=args.architecture, queue_size=args.queue_size, batch_norm=args.batch_norm)
    model = MoCoModel(config).to(device, memory_format=torch.channels_last).train()
    views = torch.randint(256, (2, args.global_batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    views = views.to(device)
    return {name: VARIANTS[name](copy.deepcopy(model), views, args.precision, args.compile) for name in names}


def build_step(name: str, args: argparse.Namespace) -> Step:
    return build_steps([name], args)[name]


def peak_bytes(name: str, args: argparse.Namespace, threads: int) -> int:
    """Peak memory of a variant in bytes over two steps, with its model."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step = build_step(name, args)
        step(), step()
        return torch.cuda.max_memory_allocated()
    with PeakMemory() as memory:
        step = build_step(name, args)
        step(), step()
    return memory.bytes


def run(args: argparse.Namespace) -> list[Benchmark]:
    if args.queue_size % args.global_batch_size:
        raise ValueError(
            f"queue_size ({args.queue_size}) must be a multiple of global_batch_size ({args.global_batch_size}), as the "
            "official code requires: change either"
        )
    threads = torch.get_num_threads()
    gigabytes = {name: in_own_process(peak_bytes, name, args, threads) / 1e9 for name in VARIANTS}
    seconds = time_rounds(build_steps(list(VARIANTS), args), args.rounds)
    title = (
        f"a step: {args.architecture}, {args.global_batch_size} images of {args.image_size} px, K {args.queue_size:,}, "
        f"{args.precision}{', split BatchNorm' * (args.batch_norm == 'split')}{', compiled' * args.compile}, "
        f"{args.rounds} interleaved rounds"
    )
    return [
        Benchmark(title, seconds, ("encoder only", "official style"), args.global_batch_size, {"peak GB": gigabytes})
    ]
