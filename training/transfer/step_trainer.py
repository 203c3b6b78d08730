"""StepTrainer: trained for a number of steps, with a schedule in steps and BatchNorm without weight decay."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.nn.modules.batchnorm import _BatchNorm

from ..engine.sgd_trainer import SGDTrainer, SGDTrainingArguments
from ..optimization.schedules import step_schedule


@dataclass
class StepTrainingArguments(SGDTrainingArguments):
    """SGDTrainingArguments that count steps, not epochs; a task sets the defaults of its papers."""

    NOT_OFFERED: ClassVar[frozenset[str]] = SGDTrainingArguments.NOT_OFFERED | {
        *(
            "lr_milestones",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_epochs",
            "learning_rate_scaling",
            "num_train_epochs",
        ),
        *("eval_strategy", "per_device_eval_batch_size", "torch_compile", "torch_compile_mode"),
        "torch_compile_backend",
    }
    TRAINED: ClassVar[str] = "models"  # what is trained, in a message

    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps."})
    global_batch_size: int = field(default=16, metadata={"help": "Images per optimizer step over all devices."})
    step_milestones: list[int] = field(
        default_factory=list,
        metadata={"help": "Steps at which the learning rate drops to a tenth; without a value none."},
    )
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps in which the learning rate rises from a thousandth of it."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay, not of BatchNorm."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_steps: float = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    logging_steps: float = field(default=20, metadata={"help": "Optimizer steps between two log entries."})
    dataloader_drop_last: bool = field(default=True)

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps ({self.max_steps}) must be at least 1: {self.TRAINED} are trained for a number of steps"
            )
        if self.warmup_steps != int(self.warmup_steps) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps ({self.warmup_steps:g}) must be a whole number of steps, at least 0")
        super().__post_init__()


class StepTrainer(SGDTrainer):
    """Trains by a learning rate that falls at given steps.

    Args:
        images: what the train images have, in a message.

    Raises:
        ValueError: there are fewer images than a batch has.
    """

    args: StepTrainingArguments

    def __init__(self, *, args: StepTrainingArguments, train_dataset: Any, images: str, **kwargs: Any):
        micro_batch = args.per_device_train_batch_size * args.world_size
        if len(train_dataset) < micro_batch:
            raise ValueError(
                f"the train split ({len(train_dataset)} {images}) is smaller than the global batch ({micro_batch}): "
                "lower the batch or use more images"
            )
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
        return [name for name, p in model.named_parameters() if id(p) not in norms]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        self.lr_scheduler = step_schedule(optimizer or self.optimizer, int(args.warmup_steps), args.step_milestones)
        return self.lr_scheduler
