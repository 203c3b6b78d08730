"""The flags of the linear probe, apart from its trainer: recipes check their `probe` section against them."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers.trainer_utils import SchedulerType

from ..engine.sgd_trainer import SGDTrainingArguments
from ..optimization.choice import DEFAULTS, OF_ADAM, WITHOUT_BETAS, optimizer_in_words
from ..optimization.schedules import read_scheduler_arguments

CACHED_RATES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
READ_BY_CACHED = {
    *("mode", "learning_rates", "num_train_epochs", "lr_milestones", "global_batch_size", "seed", "use_cpu"),
    *("per_device_eval_batch_size", "dataloader_num_workers", "report_to", "project", "run_name"),
}

# What the cached mode trains without.
OF_OFFICIAL = {
    *("optim", "optim_args", "weight_decay", "lr_scheduler_type", "learning_rate_scaling"),
    *("lr_scheduler_kwargs", "max_grad_norm", "warmup_steps", "warmup_epochs"),
}


def check_choice(args: SGDTrainingArguments) -> None:
    """
    Raises:
        ValueError: the evaluated images would choose the weights that they are to measure.
    """
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end (True) would choose the epoch by the images that are reported on: leave it out, the best "
            "epoch of a probe is listed beside its last one"
        )


@dataclass
class LinearProbeArguments(SGDTrainingArguments):
    """The published settings."""

    # A frozen encoder keeps no activations.
    NOT_OFFERED: ClassVar[frozenset[str]] = SGDTrainingArguments.NOT_OFFERED | {
        *("activation_checkpointing", "gradient_checkpointing")
    }
    NOT_READ: ClassVar[dict[str, Any]] = SGDTrainingArguments.NOT_READ | {"label_smoothing_factor": 0}

    mode: Literal["official", "cached"] = field(
        default="official",
        metadata={
            "help": "How to train: official, on augmented crops, as published; or cached, on features that are extracted once, "
            f"in seconds. The cached mode reads {', '.join(sorted(READ_BY_CACHED - {'mode'}))}."
        },
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Train a classifier at each of these learning rates and choose on a held-out tenth of the train split. By "
            f"default learning_rate alone, in cached mode {' '.join(f'{rate:g}' for rate in CACHED_RATES)}."
        },
    )
    num_train_epochs: float = field(default=100, metadata={"help": "Passes over the images."})
    learning_rate: float = field(
        default=30.0, metadata={"help": "Learning rate. The features are small, hence its size."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the classifier."})
    lr_milestones: list[int] | None = field(
        default_factory=lambda: [60, 80],
        metadata={
            "help": "Epochs at which the learning rate drops to a tenth; without a value none, which is the cosine."
        },
    )
    global_batch_size: int = field(default=256, metadata={"help": "Images per optimizer step over all devices."})
    eval_strategy: Literal["no", "epoch"] = field(default="epoch", metadata={"help": "When to evaluate: no, epoch."})

    def __post_init__(self):
        check_choice(self)
        if self.mode == "cached":  # whatever a recipe says of the official mode
            for f in fields(self):
                if f.name in OF_OFFICIAL:
                    setattr(self, f.name, f.default)
            if self.num_train_epochs != math.ceil(self.num_train_epochs) and math.isfinite(self.num_train_epochs):
                raise ValueError(f"num_train_epochs ({self.num_train_epochs:g}) must be whole in the cached mode")
        name = "learning_rate" if self.learning_rates is None else "learning_rates"
        if not self.given_rates or not all(0 < rate < math.inf for rate in self.given_rates):
            raise ValueError(f"{name} ({_listed(self.given_rates)}) must be above 0: the published one is 30")
        if len({f"{rate:g}" for rate in self.given_rates}) < len(self.given_rates):
            raise ValueError(f"{name} ({_listed(self.given_rates)}) has a learning rate twice: name each once")
        super().__post_init__()

    @property
    def rates(self) -> list[float]:
        """The learning rate of every head, as its optimizer has it."""
        return list(map(self.scaled, self.given_rates))

    @property
    def given_rates(self) -> list[float]:
        """The same before `learning_rate_scaling`."""
        if self.learning_rates is not None:
            return self.learning_rates
        return CACHED_RATES if self.mode == "cached" else [self.learning_rate]

    @property
    def protocol(self) -> str:
        """The words that stand for training by SGD with these settings in results."""
        rates = f"learning rate {self.in_words(self.given_rates)}" + (
            " by a held-out tenth" if len(self.rates) > 1 else ""
        )
        length = f"{self.max_steps} steps of " if self.max_steps > 0 else ""
        words = f"{rates}, {length}{self.num_train_epochs:g} epochs, {schedule(self)}, batch {self.global_batch_size}"
        return words + optimizer(self)


def schedule(args: SGDTrainingArguments) -> str:
    """How the learning rate goes down, in words."""
    if args.lr_milestones:
        return f"a tenth at {_listed(args.lr_milestones)}{args.warmup}"
    settings = "".join(f" {name}={value}" for name, value in read_scheduler_arguments(args.lr_scheduler_kwargs).items())
    return SchedulerType(args.lr_scheduler_type).value + settings + args.warmup


def optimizer(args: SGDTrainingArguments) -> str:
    """The optimizer and its precision in words that follow others; none for the published ones, which clip no gradient."""
    more = f", gradients clipped to {args.max_grad_norm:g}" if args.max_grad_norm else ""
    more += ", trained in bf16" * bool(args.bf16) + ", trained in fp16" * bool(args.fp16)
    if (args.optim, args.optim_args, args.weight_decay) == ("sgd", DEFAULTS["sgd"], 0):
        return more
    usual = {f.name: f.default for f in fields(args) if f.name in OF_ADAM and args.optim not in WITHOUT_BETAS}
    changed = "".join(f" {name}={getattr(args, name):g}" for name in usual if getattr(args, name) != usual[name])
    words = optimizer_in_words(args.optim, args.optim_args) + changed
    return f", {words}, weight decay {args.weight_decay:g}{more}"


def _listed(numbers: list[Any]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
