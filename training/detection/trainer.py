"""DetectionTrainer: a detector trained as the MoCo papers train it, in steps, and evaluated after precise BatchNorm."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_moco import MoCoDetectionImageProcessor, MoCoForObjectDetection
from modeling_moco.distributed_moco import gather, rank

from ..engine.preemption import outlive_signals
from ..transfer.step_trainer import StepTrainer, StepTrainingArguments
from .dataset.batches import DetectionCollator, OrientationBatches
from .dataset.views import DetectionImages
from .precise_bn import set_precise_statistics

logger = logging.getLogger(__name__)

PUBLISHED_BATCH = 16  # images per step that the published learning rate is for


@dataclass
class DetectionTrainingArguments(StepTrainingArguments):
    """The training of the papers on VOC: 24,000 steps of 16 images (arXiv:1911.05722, table 2, and detectron2's defaults)."""

    TRAINED = "detectors"

    max_steps: int = field(default=24_000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=0.02, metadata={"help": "Learning rate; 0.02 is for a global batch of 16."})
    step_milestones: list[int] = field(
        default_factory=lambda: [18_000, 22_000],
        metadata={"help": "Steps at which the learning rate drops to a tenth; without a value none."},
    )
    warmup_steps: float = field(
        default=100, metadata={"help": "Steps in which the learning rate rises from a thousandth of it."}
    )
    precise_bn_steps: int = field(
        default=200,
        metadata={
            "help": "Batches whose statistics BatchNorm gets before an evaluation; 0 keeps the running averages."
        },
    )

    def __post_init__(self):
        if self.precise_bn_steps < 0:
            raise ValueError(f"precise_bn_steps ({self.precise_bn_steps}) must be at least 0")
        super().__post_init__()


class _Batches(OrientationBatches):
    drop_last = True  # accelerate asks for it, where several processes take turns


class DetectionTrainer(StepTrainer):
    """Trains a [`MoCoForObjectDetection`].

    Args:
        train_dataset: views of images with their objects.
        processing_class: the image processor, saved beside every checkpoint.
    """

    args: DetectionTrainingArguments
    train_dataset: DetectionImages

    def __init__(
        self,
        model: MoCoForObjectDetection,
        args: DetectionTrainingArguments,
        train_dataset: DetectionImages,
        processing_class: MoCoDetectionImageProcessor,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            images="images with objects",
            processing_class=processing_class,
            data_collator=DetectionCollator(processing_class.image_mean, processing_class.image_std),
        )
        self._losses: list[torch.Tensor] = []
        self._names: list[str] = []

    def build_train_dataloader(self) -> DataLoader:
        args = self.args
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=_Batches(self.train_dataset, args.per_device_train_batch_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            worker_init_fn=outlive_signals,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: x for name, x in inputs.items() if name != "image_id"})
        self._names = list(outputs.loss_dict)
        self._losses.append(torch.stack([*outputs.loss_dict.values()]))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._losses:
            means = gather(torch.stack(self._losses)).mean(dim=0).tolist()
            logs |= dict(zip(self._names, means, strict=True))
            self._losses = []
        super().log(logs, start_time)

    def set_precise_statistics(self) -> None:
        """Give BatchNorm the statistics of `precise_bn_steps` batches, with views that the training has not used."""
        steps = self.args.precise_bn_steps
        if not steps:
            return
        batches = tqdm(
            islice(self._later_batches(), steps), "precise BN", steps, leave=False, disable=rank() > 0 or None
        )
        with self.compute_loss_context_manager():
            set_precise_statistics(
                self.model, batches, lambda x: self.compute_loss(self.model, self._prepare_inputs(x))
            )
        self._losses = []

    def _later_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of this process from the first epoch on that the training does not reach."""
        loader: Any = self.get_train_dataloader()
        for epoch in count(1 + int(self.state.epoch or 0)):
            self.train_dataset.set_epoch(epoch)
            loader.set_epoch(epoch)
            yield from loader


def trained_norms(model: nn.Module) -> int:
    """Number of BatchNorm layers that training changes."""
    return sum(isinstance(m, _BatchNorm) and m.weight.requires_grad for m in model.modules())
