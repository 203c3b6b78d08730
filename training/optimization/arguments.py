"""Flags of the optimizer and of its learning rate, and their words."""

import math
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .choice import DEFAULTS, LARS, check_name, optimizer_in_words, parse_arguments
from .schedules import Scaling, check_scheduler, rates_in_words, read_scheduler_arguments, scaled_rate


@dataclass
class OptimizationArguments(TrainingArguments):
    """TrainingArguments with the optimizers and schedules of the papers. Their defaults are those of v1 and v2.

    Raises:
        ValueError: a value is out of its range, an argument is none of its optimizer or schedule, or two settings mean nothing
            together.
    """

    global_batch_size: int = field(  # type: ignore[assignment]  # None until __post_init__ knows the processes
        default=None,
        metadata={"help": "Images per optimizer step over all devices, instead of per_device_train_batch_size."},
    )
    lr_milestones: list[int] | None = field(
        default=None,
        metadata={
            "help": "Epochs at which the learning rate drops to a tenth (v1: 120 160), instead of the cosine; "
            "without a value none."
        },
    )
    learning_rate_scaling: Scaling = field(
        default="none",
        metadata={
            "help": "Rule that makes the optimizer's learning rate of learning_rate and the global batch B: none, linear "
            "(x B/256) or sqrt (x sqrt(B))."
        },
    )
    warmup_epochs: float = field(
        default=0.0,
        metadata={
            "help": "Epochs in which the learning rate rises from 0, in every step; after them the cosine falls in every step "
            "too. 0 is the schedule of v1 and v2, in whole epochs."
        },
    )
    optim: str = field(
        default="sgd",
        metadata={
            "help": "Name of the optimizer: sgd (v1 and v2), lars (SimCLR, and v3 of a ResNet), adamw_torch (v3 of a ViT), or "
            "another of transformers."
        },
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the optimizer as name=value, with commas between: momentum, dampening and nesterov of sgd; "
            "momentum, trust_coefficient and classic (true is SimCLR's form, false that of v3) of lars. By default "
            "momentum=0.9 for both. Those of adamw_torch are flags: adam_beta1, adam_beta2, adam_epsilon."
        },
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "Schedule of the learning rate; cosine is the official one, in whole epochs."},
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of another schedule than the official one, as JSON: '{\"min_lr\": 0.001}'."},
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Norm that gradients are clipped to; 0 does not clip."})

    def __post_init__(self):
        check_name(self.optim)
        self.optim_args = self.optim_args or DEFAULTS.get(self.optim)
        parse_arguments(self.optim, self.optim_args)
        self._check_schedule()
        # transformers knows a fixed list of optimizers, and asks `get_optimizer_cls_and_kwargs` for the one to take.
        ours, self.optim = self.optim == LARS, "sgd" if self.optim == LARS else self.optim
        super().__post_init__()
        self.optim = LARS if ours else self.optim

    def _check_schedule(self) -> None:
        if self.learning_rate_scaling not in get_args(Scaling):
            raise ValueError(
                f"learning_rate_scaling ({self.learning_rate_scaling!r}) must be {', '.join(get_args(Scaling))}"
            )
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be at least 0")
        kind, milestones = SchedulerType(self.lr_scheduler_type), self.lr_milestones
        if milestones and min(milestones) < 1:
            raise ValueError(f"lr_milestones ({' '.join(map(str, milestones))}) must be epochs from 1 on: correct them")
        self.lr_scheduler_kwargs = read_scheduler_arguments(self.lr_scheduler_kwargs)
        official = kind == SchedulerType.COSINE and not self.warmup_steps
        if official and self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_kwargs ({self.lr_scheduler_kwargs}) has no effect on the official schedule, the cosine or "
                "lr_milestones: leave it out, or pass the --lr_scheduler_type that it is for"
            )
        if milestones and kind != SchedulerType.COSINE:
            raise ValueError(
                f"lr_scheduler_type ({kind.value}) and lr_milestones ({' '.join(map(str, milestones))}) are two schedules: "
                "pass one of them; --lr_milestones without a value is none"
            )
        if self.warmup_steps and (milestones or self.warmup_epochs):
            other = "lr_milestones" if milestones else "warmup_epochs"
            raise ValueError(
                f"warmup_steps ({self.warmup_steps:g}) does not go with {other}: pass --warmup_epochs alone for the warm-up"
            )
        if self.warmup_epochs and kind != SchedulerType.COSINE:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) goes before the cosine or lr_milestones, and not before "
                f"{kind.value}: pass --warmup_steps"
            )
        if self.max_steps < 0 and self.warmup_epochs >= self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) must be below num_train_epochs ({self.num_train_epochs:g}): nothing "
                "would follow the warm-up"
            )
        check_scheduler(kind, self.lr_scheduler_kwargs)

    @property
    def late_milestones(self) -> str | None:
        """A sentence about milestones that the run does not reach; None without one, or where a run counts its steps."""
        late = [milestone for milestone in self.lr_milestones or [] if milestone >= self.num_train_epochs]
        if not late or self.max_steps > 0:
            return None
        return (
            f"lr_milestones ({' '.join(map(str, late))}) come after the last of {self.num_train_epochs:g} epochs, and the "
            "learning rate does not drop there: pass --lr_milestones for this length"
        )

    def scaled(self, rate: float) -> float:
        """The optimizer's learning rate for one that a flag gave."""
        return scaled_rate(rate, self.learning_rate_scaling, self.global_batch_size)

    def in_words(self, rates: list[float]) -> str:
        """Learning rates that flags gave, and those that the optimizer has."""
        return rates_in_words(rates, self.learning_rate_scaling, self.global_batch_size)

    @property
    def optimization(self) -> str:
        """The learning rate, the optimizer if it is another than SGD with momentum 0.9, and the warm-up, in words."""
        usual = (self.optim, self.optim_args) == ("sgd", DEFAULTS["sgd"])
        by = "" if usual else f" by {optimizer_in_words(self.optim, self.optim_args)}"
        return self.in_words([self.learning_rate]) + by + self.warmup

    @property
    def warmup(self) -> str:
        """The warm-up in words that follow others; none without one."""
        if self.warmup_epochs:
            return f" after a warm-up of {self.warmup_epochs:g} epoch{'' if self.warmup_epochs == 1 else 's'}"
        share = f"{100 * self.warmup_steps:g} % of the" if self.warmup_steps < 1 else f"{self.warmup_steps:g}"
        return f" after a warm-up of {share} steps" if self.warmup_steps else ""
