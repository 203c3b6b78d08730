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
        default_factory=lambda: [60, 80], metadata={"help": "Epochs at which the learning rate drops to a tenth."}
    )
    global_batch_size: int = field(default=256, metadata={"help": "Images per optimizer step over all devices."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, epoch."})

    def __post_init__(self):
        super().__post_init__()
        name = "learning_rate" if self.learning_rates is None else "learning_rates"
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"{name} ({_listed(self.rates)}) must be above 0: the published one is 30")
        if len({f"{rate:g}" for rate in self.rates}) < len(self.rates):
            raise ValueError(f"{name} ({_listed(self.rates)}) has a learning rate twice: name each once")

    @property
    def rates(self) -> list[float]:
        """The learning rate of every head."""
        if self.learning_rates is not None:
            return self.learning_rates
        return CACHED_RATES if self.mode == "cached" else [self.learning_rate]

    @property
    def protocol(self) -> str:
        """The words that stand for training by SGD with these settings in results."""
        rates = f"learning rate {_listed(self.rates)}" + (" by a held-out tenth" if len(self.rates) > 1 else "")
        drops = f"a tenth at {_listed(self.lr_milestones)}" if self.lr_milestones else "cosine"
        length = f"{self.max_steps} steps of " if self.max_steps > 0 else ""
        words = f"{rates}, {length}{self.num_train_epochs:g} epochs, {drops}, batch {self.global_batch_size}"
        optimizer = OptimizerNames(self.optim)
        if (optimizer, self.optim_args, self.weight_decay) != (OptimizerNames.SGD, "momentum=0.9", 0):
            words += f", {optimizer.value} {self.optim_args}, weight decay {self.weight_decay:g}"
        return words


def _listed(numbers: list[Any]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
