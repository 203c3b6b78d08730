"""A step as one CUDA graph: the host starts the whole of it at once, instead of a thousand kernels one by one."""

from collections.abc import Callable

import torch

from modeling_moco import MoCoModel

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], tuple[torch.Tensor, ...]]


class StepGraph:
    """Records forward and backward of a step, and replays them: what the step itself would compute.

    A GPU that is done before the host has started its next kernel waits; that is so for small networks, images and batches.
    The first steps run as they are, which lets libraries choose and compile their kernels. The orders that keys are encoded
    in are drawn on the host before every replay, as the step itself would draw them.

    Args:
        model: whose parameters get gradients.
        step: takes a batch on the device, gives the parameters their gradients, and returns tensors. It reads nothing back
            from the GPU and changes no state of Python's.

    Raises:
        ValueError: a batch has another shape than the first one.
    """

    WARM_UP = 3

    def __init__(self, model: MoCoModel, step: Step):
        self.model = model
        self.step = step
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Make the step with this batch; the next one leaves what it returns alone."""
        self._steps += 1
        if self._steps <= self.WARM_UP:
            return self._aside(batch)
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None
        self._take(batch)
        self._graph.replay()
        for parameter, gradient in self._gradients:  # the optimizer's zero_grad takes them off
            parameter.grad = gradient
        return tuple(x.clone() for x in self._outputs)

    def _aside(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        # On a stream of its own, as a recording is: autograd remembers the streams of a step.
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            outputs = self.step(batch)
        main.wait_stream(aside)
        return outputs

    def _record(self, batch: Batch) -> None:
        model, device = self.model, self.model.device
        self._batch = {name: x.clone() for name, x in batch.items()}
        images = len(next(iter(batch.values())))
        split = model.config.batch_norm == "split" and model.config.key_encoder != "none"
        count = (2 if model.config.symmetric_loss else 1) if split else 0
        self._orders = torch.arange(images, device=device).repeat(count, 1)
        model.given_orders = iter(self._orders)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: that of a loader pins memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self.step(self._batch)
        model.given_orders = None
        self._graph = graph
        self._gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def _take(self, batch: Batch) -> None:
        for name, recorded in self._batch.items():
            if batch[name].shape != recorded.shape:
                raise ValueError(
                    f"a batch has {name} of the shape {tuple(batch[name].shape)}, but the step was recorded for "
                    f"{tuple(recorded.shape)}: give whole batches of one size, or leave cuda_graph off"
                )
            recorded.copy_(batch[name], non_blocking=True)
        if len(self._orders):
            orders = torch.stack([self.model.random_order(self._orders.shape[1]) for _ in self._orders])
            self._orders.copy_(orders.pin_memory(), non_blocking=True)
