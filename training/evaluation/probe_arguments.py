"""The flags of the linear probe, apart from its trainer: recipes check their `probe` section against them."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.training_args import OptimizerNames

from ..engine.sgd_trainer import SGDTrainingArguments

CACHED_RATES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
READ_BY_CACHED = {
    *("mode", "learning_rates", "num_train_epochs", "lr_milestones", "global_batch_size", "seed", "use_cpu"),
    *("per_device_eval_batch_size", "dataloader_num_workers", "report_to", "project", "run_name"),
}


@dataclass
class LinearProbeArguments(SGDTrainingArguments):
    """The published settings."""

    mode: Literal["official", "cached"] = field(
        default="official",
        metadata={
            "help": "official: augmented crops, as published; cached: features extracted once, in seconds. cached reads "
            + ", ".join(sorted(READ_BY_CACHED - {"mode"}))
        },
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "train a classifier at each of these rates and choose on a held-out tenth of the train split; by default "
            f"learning_rate alone, in cached mode {' '.join(f'{rate:g}' for rate in CACHED_RATES)}"
        },
    )
    num_train_epochs: float = field(default=100, metadata={"help": "passes over the images"})
    learning_rate: float = field(default=30.0, metadata={"help": "the features are small, hence the size"})
    weight_decay: float = field(default=0.0, metadata={"help": "of the classifier"})
    lr_milestones: list[int] | None = field(
        default_factory=lambda: [60, 80], metadata={"help": "epochs at which the rate drops to a tenth"}
    )
    global_batch_size: int = field(default=256, metadata={"help": "images per optimizer step over all devices"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, epoch"})

    def __post_init__(self):
        super().__post_init__()
        name = "learning_rate" if self.learning_rates is None else "learning_rates"
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"{name} ({_listed(self.rates)}) must be above 0: the published one is 30")
        if len({f"{rate:g}" for rate in self.rates}) < len(self.rates):
            raise ValueError(f"{name} ({_listed(self.rates)}) has a rate twice: name each once")

    @property
    def rates(self) -> list[float]:
        """The rate of every head."""
        if self.learning_rates is not None:
            return self.learning_rates
        return CACHED_RATES if self.mode == "cached" else [self.learning_rate]

    @property
    def protocol(self) -> str:
        """The words that stand for training by SGD with these settings in results."""
        rates = f"rate {_listed(self.rates)}" + (" by a held-out tenth" if len(self.rates) > 1 else "")
        drops = f"a tenth at {_listed(self.lr_milestones)}" if self.lr_milestones else "cosine"
        length = f"{self.max_steps} steps of " if self.max_steps > 0 else ""
        words = f"{rates}, {length}{self.num_train_epochs:g} epochs, {drops}, batch {self.global_batch_size}"
        optimizer = OptimizerNames(self.optim)
        if (optimizer, self.optim_args, self.weight_decay) != (OptimizerNames.SGD, "momentum=0.9", 0):
            words += f", {optimizer.value} {self.optim_args}, weight decay {self.weight_decay:g}"
        return words


def _listed(numbers: list[Any]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
