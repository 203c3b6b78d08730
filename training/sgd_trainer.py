"""transformers.Trainer set up as the official scripts train: SGD, weight decay on everything, a rate per whole epoch."""

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from modeling_moco.distributed_moco import world_size

from .checkpoints import Division, SaveOnSigterm, newest_complete, outlive_sigterm, rotate, seal
from .trackers import Trackers, run_name

NEVER = torch.iinfo(torch.int64).max


class TrainingError(RuntimeError):
    """Ends a run: says what happened at which step, and which checkpoint is left."""


@dataclass
class SGDTrainingArguments(TrainingArguments):
    """TrainingArguments whose defaults are the official scripts'. Where transformers' own would train something else."""

    _argument_group_name = "training"
    can_publish = False

    output_dir: str | None = field(default=None, metadata={"help": "where everything is written"})
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "images per optimizer step over all devices; instead of per_device_train_batch_size"},
    )
    lr_milestones: list[int] | None = field(
        default=None,
        metadata={"help": "epochs at which the rate drops to a tenth (v1: 120 160), instead of the cosine"},
    )
    seed: int = field(default=0, metadata={"help": "of weights, order and views"})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "images per device in evaluation"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch"})
    save_total_limit: int | None = field(default=2, metadata={"help": "newest checkpoints to keep"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two log entries"})
    optim: str = field(default="sgd", metadata={"help": "the papers use SGD"})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "arguments of the optimizer"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine: the official one, in whole epochs"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay off: views have no columns"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every parameter is used"})
    project: str = field(default="moco", metadata={"help": "trackers: under which runs are compared"})
    run_name: str | None = field(default=None, metadata={"help": "trackers: by default the path of output_dir"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "off: a NaN loss is shown"})

    def __post_init__(self):
        super().__post_init__()
        self._check_processes()
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit ({self.save_total_limit}) must be at least 2: where the newest checkpoint is damaged, the "
                "one before it is used"
            )
        if self.save_only_model or self.save_on_each_node:
            raise ValueError(
                "save_only_model and save_on_each_node must stay off: a run continues from one whole checkpoint, in a folder "
                "that all machines share"
            )
        if self.push_to_hub and not self.can_publish:
            raise ValueError(
                "push_to_hub (True) is for pretraining: publish the folder that this saves to with scripts/push_to_hub.py"
            )
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size < 1 or self.global_batch_size % parts:
                raise ValueError(
                    f"global_batch_size ({self.global_batch_size}) must be a positive multiple of {parts} "
                    f"({self.world_size} processes x {self.gradient_accumulation_steps} accumulation steps)"
                )
            self.per_device_train_batch_size = self.global_batch_size // parts
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn every epoch
        # accelerate's loader copies; waiting for the copy is waiting for all that the GPU has been given before.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self.trackers.check()
        # One process, one device: with more, Trainer would wrap the model in nn.DataParallel and multiply the batch.
        self._n_gpu = min(self.n_gpu, 1)
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0

    def _check_processes(self) -> None:
        # Some launch commands start one process, or several that know nothing of each other, without a word.
        asked = os.environ.get("WORLD_SIZE", "several" if "MASTER_PORT" in os.environ else "1")
        if asked != str(self.world_size):
            raise ValueError(
                f"the launcher was asked for {asked} processes, but this is one of {self.world_size}: on GPUs pass "
                "--multi_gpu to accelerate launch, on CPUs use configs/accelerate/two_cpus.yaml and --use_cpu (or unset "
                "WORLD_SIZE and MASTER_PORT)"
            )

    @property
    def device(self) -> torch.device:
        """Of this process. One of several on a CPU is "cpu:0" to accelerate, which torch.load, as transformers 5.17 calls it
        for the optimizer, does not know.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def trackers(self) -> Trackers:
        """Where results and pictures go when training is over."""
        return Trackers(self.report_to, self.project, self.run_name or run_name(Path(str(self.output_dir))))

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


def epoch_factor(epoch: int, epochs: int, milestones: list[int] | None) -> float:
    """Factor of the learning rate in `epoch` (from 0): x0.1 at every milestone passed, or without them a half cosine."""
    if milestones:
        return math.prod(0.1 for milestone in milestones if epoch >= milestone)
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def epoch_schedule(
    optimizer: Optimizer, steps_per_epoch: int, epochs: int, milestones: list[int] | None = None
) -> LambdaLR:
    """A scheduler that is stepped at every optimizer step and changes the rate at the start of every epoch.

    Args:
        steps_per_epoch: optimizer steps of one epoch.
        epochs: epochs of the run.
        milestones: epochs at which the rate drops to a tenth; none for the cosine.
    """
    return LambdaLR(optimizer, lambda step: epoch_factor(step // steps_per_epoch, epochs, milestones))


class ProgressBar(ProgressCallback):
    """One bar with the newest numbers in it, and a line at every evaluation."""

    NAMES: ClassVar = {
        "loss": ("loss", "{:.3f}"),
        "contrast_top1": ("contrast", "{:.1f}%"),
        "eval_knn_top1": ("kNN", "{:.1f}%"),
        "eval_top1": ("top-1", "{:.1f}%"),
        "images_per_second": ("images/s", "{:.0f}"),
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)  # of a resumed run
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        for key, (name, form) in self.NAMES.items():
            if key in logs:
                self.shown[name] = form.format(logs[key])
        self.training_bar.set_postfix(self.shown)
        if any(key.startswith("eval_") for key in logs):
            numbers = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            self.training_bar.write(f"epoch {logs['epoch']:g} of {args.num_train_epochs:g}: {numbers}")


class SetEpoch(TrainerCallback):
    """Tells the images which epoch it is: accelerate does not, with several processes or after a resume."""

    def __init__(self, images: Any):
        self.images = images

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # A resumed epoch begins with the batches that were trained before, which Trainer draws and throws away.
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        trained = 0 if args.ignore_data_skip else state.global_step % steps * args.gradient_accumulation_steps
        self.images.set_epoch(int(state.epoch), skip_batches=trained)


def _outliving_sigterm(loader: Any) -> Any:
    # Instead of transformers' global seed, which no view depends on. accelerate's loader wraps the one that iterates.
    loader.base_dataloader.worker_init_fn = outlive_sigterm
    return loader


class SGDTrainer(Trainer):
    """Trainer with the official optimiser and schedule, and checkpoints that are whole or do not count.

    Raises:
        TrainingError: the loss or a weight is not finite, or a checkpoint cannot be written.
    """

    args: SGDTrainingArguments
    lr_scheduler: Any

    def __init__(self, *, args: SGDTrainingArguments, **kwargs):
        try:
            os.makedirs(str(args.output_dir), exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir ({args.output_dir}) cannot be made ({error}): pass another") from error
        args.run_name = args.trackers.run_name  # or trackio would give a continued run another name
        super().__init__(args=args, **kwargs)
        # Convolutions are faster in this layout: 1.4 times on a CPU (test_resnet, 32 px), and tensor cores want it.
        self.model.to(memory_format=torch.channels_last)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar)
        self.add_callback(SetEpoch(self.train_dataset))
        self._sigterm = SaveOnSigterm()
        self.add_callback(self._sigterm)
        self._diverged_at = torch.tensor(NEVER, device=self.args.device)  # first step with a loss that is not finite
        self._saved_at: int | None = None  # step of the last checkpoint

    @property
    def terminated(self) -> bool:
        """Whether a SIGTERM ended the training early; what it reached has been saved."""
        return self._sigterm.stopped

    @property
    def division(self) -> Division:
        """How this run divides its images, and how far it has come."""
        args = self.args
        return Division(
            processes=args.world_size,
            per_device_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            images=self.train_dataset.images_per_epoch,
            workers=max(1, args.dataloader_num_workers) if isinstance(self.train_dataset, IterableDataset) else None,
            epoch=float(self.state.epoch or 0),
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, _ in model.named_parameters()]  # the official optimiser decays everything

    def get_train_dataloader(self) -> DataLoader:
        loader = self.build_train_dataloader()
        self._batches_per_epoch = len(loader)  # the schedule counts in epochs
        return loader

    def build_train_dataloader(self) -> DataLoader:
        return _outliving_sigterm(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return _outliving_sigterm(super().get_eval_dataloader(eval_dataset))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        official = args.lr_milestones or (
            args.lr_scheduler_type == SchedulerType.COSINE and not args.get_warmup_steps(num_training_steps)
        )
        if self.lr_scheduler is None and official:
            steps = math.ceil(self._batches_per_epoch / args.gradient_accumulation_steps)
            epochs = math.ceil(num_training_steps / steps)
            self.lr_scheduler = epoch_schedule(optimizer or self.optimizer, steps, epochs, args.lr_milestones)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Noted on the device, and looked at when something is logged or saved: asking now would wait for the GPU.
        self._note(loss.isfinite(), self.state.global_step + 1)
        return loss

    def train(self, *args, **kwargs):
        self._diverged_at.fill_(NEVER)
        self._saved_at = None
        result = super().train(*args, **kwargs)
        self._check_finite(weights=True)
        return result

    def _note(self, finite: torch.Tensor, step: int) -> None:
        self._diverged_at.clamp_(max=torch.where(finite, NEVER, step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._check_finite()
        super().log(logs, start_time)

    def _check_finite(self, weights: bool = False) -> None:
        if weights:
            state = self.model.state_dict().values()
            self._note(torch.stack([tensor.isfinite().all() for tensor in state]).all(), self.state.global_step)
        if world_size() > 1:
            dist.all_reduce(self._diverged_at, dist.ReduceOp.MIN)
        if self._diverged_at < NEVER:
            raise TrainingError(
                f"the loss or a weight is no longer finite since step {int(self._diverged_at)}; {self._last_checkpoint()}. "
                "Train again with a lower --learning_rate, or in bf16 instead of fp16, into another --output_dir"
            )

    def _last_checkpoint(self) -> str:
        checkpoint, _ = newest_complete(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"

    def _save_checkpoint(self, model, trial) -> None:
        step, output_dir = self.state.global_step, Path(str(self.args.output_dir))
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_at == step:
            return
        self._check_finite(weights=True)
        if self.is_world_process_zero():
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a killed process left of it
        self._wait()
        # Trainer would delete older checkpoints before this one counts.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._wait()
            if self.is_world_process_zero():
                seal(checkpoint, self.division)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's for a full disk
                raise
            if self.is_world_process_zero():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise TrainingError(
                f"{checkpoint} could not be written ({error}); {self._last_checkpoint()}. Make room and give the same "
                "command to continue"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.is_world_process_zero():
            rotate(output_dir, limit, self.state.best_model_checkpoint)
        self._saved_at = step

    def _wait(self) -> None:
        if world_size() > 1:
            dist.barrier()
