"""transformers.Trainer set up as the official scripts train: their optimizers, weight decay, and learning rates."""

import math
import os
import shlex
import signal
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, safe_globals
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_moco.distributed_moco import world_size

from ..cli import how_to_run
from ..errors import DataError, TrainingError, data_reason, one_line, one_line_errors
from ..optimization.arguments import OptimizationArguments
from ..optimization.choice import (
    LARS,
    OF_ADAM,
    WITHOUT_BETAS,
    optimizer_in_words,
    parse_arguments,
)
from ..optimization.lars import Lars
from ..optimization.schedules import (
    epoch_schedule,
    warmup_schedule,
)
from .callbacks import ProgressBar, ProgressLines, SetEpoch
from .checkpoints import BatchLayout, CompleteCheckpoints, newest_complete
from .files import UNREADABLE, check_archive, whole_file, whole_files
from .preemption import SaveAndStop, TellOfLongSteps, outlive_signals
from .record import Trackers, run_name

STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")  # pickles of a checkpoint
REQUEUE = 75  # exit status after a signal: saved, the same command continues (EX_TEMPFAIL of sysexits.h)
NEVER = torch.iinfo(torch.int64).max
LEAST = {
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "dataloader_num_workers"), 0),
}
# Settings that nothing here reads, and the value that they have; a command line does not offer them.
NOT_READ = {"auto_find_batch_size": False, "neftune_noise_alpha": None, "train_sampling_strategy": "random"}
# What transformers calls its settings for the Hub. Only pretraining publishes while it runs.
PUBLISHING = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")


@dataclass
class SGDTrainingArguments(OptimizationArguments):
    """TrainingArguments with the official scripts' defaults wherever transformers' own would train differently."""

    _argument_group_name = "training"
    # Fields of transformers that a command does not offer as flags: they may have one value only, or do nothing there.
    NOT_OFFERED: ClassVar[frozenset[str]] = frozenset(
        {
            *(
                "accelerator_config",
                "activation_checkpointing_kwargs",
                "auto_find_batch_size",
                "average_tokens_across_devices",
                "batch_eval_metrics",
            ),
            *("data_seed", "dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context"),
            *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
            *("ddp_static_graph", "debug", "deepspeed", "do_eval", "do_predict", "do_train", "enable_jit_checkpoint"),
            *("eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_on_start", "eval_steps"),
            *("eval_use_gather_object", "fp16_full_eval", "bf16_full_eval", "fsdp", "fsdp_config", "greater_is_better"),
            *PUBLISHING,
            *("hub_always_push", "hub_token", "ignore_data_skip", "include_for_metrics"),
            *("include_num_input_tokens_seen", "label_names", "label_smoothing_factor", "length_column_name"),
            *("load_best_model_at_end", "log_on_each_node", "logging_nan_inf_filter"),
            *("metric_for_best_model", "neftune_noise_alpha", "optim_target_modules", "parallelism_config"),
            *(
                "prediction_loss_only",
                "remove_unused_columns",
                "resume_from_checkpoint",
                "restore_callback_states_from_checkpoint",
            ),
            *("save_on_each_node", "save_only_model", "skip_memory_metrics", "torch_empty_cache_steps"),
            *(
                "train_sampling_strategy",
                "use_legacy_prediction_loop",
                "use_cache",
                "use_liger_kernel",
                "liger_kernel_config",
                "gradient_checkpointing_kwargs",
            ),
        }
    )

    NOT_READ: ClassVar[dict[str, Any]] = NOT_READ

    output_dir: str | None = field(default=None, metadata={"help": "Folder that everything is written to."})
    seed: int = field(default=0, metadata={"help": "Random seed for weights, data order and views."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per device in evaluation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of newest checkpoints to keep."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log entries."})
    remove_unused_columns: bool = field(default=False)  # views have no columns
    ddp_find_unused_parameters: bool | None = field(default=False)  # every parameter is used
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Publish the encoder on the Hub at every save and at the end; see hub_strategy."},
    )
    project: str = field(default="moco", metadata={"help": "Project under which trackers group the runs."})
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run in trackers; by default the path of output_dir."}
    )
    logging_nan_inf_filter: bool = field(default=False)  # a NaN loss is shown

    def __post_init__(self):
        self._check_values()
        if "MASTER_ADDR" not in os.environ:  # nobody to connect to: accelerate would try, and leave half a state behind
            self._check_processes(1)
        super().__post_init__()
        self._check_processes(self.world_size)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 (True) has no effect on a CPU: leave it out, or pass --bf16 true --use_cpu true")
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
        if self.push_to_hub and "push_to_hub" in self.NOT_OFFERED:
            raise ValueError(
                f"push_to_hub (True) is for pretraining: publish the folder that this saves to by {how_to_run('publish')}"
            )
        if self.hub_token is not None:
            raise ValueError(
                "hub_token must be None, for Trainer writes its arguments beside every checkpoint: log in with "
                "`hf auth login`, or set HF_TOKEN"
            )
        # Trainer must not see this flag: it would upload the folder of a run as it is, pickles and local paths included.
        self.publish = self.push_to_hub
        self.push_to_hub = False
        if self.global_batch_size is not None:
            parts = self.world_size * self.gradient_accumulation_steps
            if self.global_batch_size < 1 or self.global_batch_size % parts:
                raise ValueError(
                    f"global_batch_size ({self.global_batch_size}) must be a positive multiple of {parts} "
                    f"({self.world_size} processes x {self.gradient_accumulation_steps} accumulation steps)"
                )
            self.per_device_train_batch_size = self.global_batch_size // parts
        self.global_batch_size = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn every epoch
        # accelerate's loader copies; waiting for the copy is waiting for all that the GPU has been given before.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self.trackers.check()
        # One process, one device: with more, Trainer would wrap the model in nn.DataParallel and multiply the batch. The
        # public `n_gpu` can only be read.
        self._n_gpu = min(self.n_gpu, 1)
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0

    def _check_values(self) -> None:
        for name, least in LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a number of at least {least}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps ({self.max_steps}) must be at least 1: leave it out to train for num_train_epochs"
            )
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs ({self.num_train_epochs}) must be a number above 0: there is nothing to train for"
            )
        for name, usual in self.NOT_READ.items():
            if getattr(self, name) != usual:
                raise ValueError(f"{name} ({getattr(self, name)}) has no effect here: leave it out")
        self._check_intervals()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns (True) would remove the views: leave it off")
        if self.deepspeed is not None and find_spec("deepspeed") is None:
            raise ValueError(f"deepspeed ({self.deepspeed!r}) needs a package: pip install deepspeed, or leave it out")

    def _check_intervals(self) -> None:
        if SaveStrategy(self.save_strategy) == SaveStrategy.BEST and self.metric_for_best_model is None:
            raise ValueError("save_strategy (best) must be no, steps or epoch")
        for name, strategy in (("save_steps", self.save_strategy), ("logging_steps", self.logging_strategy)):
            if strategy == "steps" and not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} ({getattr(self, name):g}) must be above 0: steps, or below 1 a share of all steps"
                )

    @property
    def without_effect(self) -> dict[str, str]:
        """Flags that these settings leave without effect, which a command line that has one is told: why, by name."""
        idle = {}
        if self.save_strategy != SaveStrategy.STEPS:
            idle["save_steps"] = "it is for --save_strategy steps"
        if self.logging_strategy != IntervalStrategy.STEPS:
            idle["logging_steps"] = "it is for --logging_strategy steps"
        if self.optim in WITHOUT_BETAS:
            idle |= dict.fromkeys(OF_ADAM, f"--optim {optimizer_in_words(self.optim, None)} does not read it")
        return idle

    @staticmethod
    def _check_processes(started: int) -> None:
        # Some launch commands silently start one process, or several unconnected ones.
        asked = os.environ.get("WORLD_SIZE", "several" if "MASTER_PORT" in os.environ else "1")
        if asked != str(started):
            raise ValueError(
                f"the launcher was asked for {asked} processes, but this is one of {started}: on GPUs pass "
                "--multi_gpu to accelerate launch, on CPUs use configs/accelerate/two_cpus.yaml and --use_cpu (or unset "
                "WORLD_SIZE and MASTER_PORT)"
            )

    @property
    def device(self) -> torch.device:
        """Device of this process.

        One of several on a CPU is "cpu:0" to accelerate, which torch.load, as transformers 5.18 calls it for the optimizer,
        does not know.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def trackers(self) -> Trackers:
        """Where results and figures go when training is over."""
        folder = Path(str(self.output_dir))
        return Trackers(
            self.report_to,
            self.project,
            self.run_name or run_name(folder),
            folder,
            trackio_elsewhere=bool(self.trackio_space_id or self.trackio_static_space_id),
        )


class SGDTrainer(Trainer):
    """Trainer with the official optimizer and schedule, and checkpoints that are complete or do not count.

    Raises:
        TrainingError: the loss or a weight is not finite, or a checkpoint cannot be written.
    """

    args: SGDTrainingArguments
    lr_scheduler: Any

    def __init__(self, *, args: SGDTrainingArguments, **kwargs):
        try:  # now: transformers asks for it after the run has begun
            self.get_optimizer_cls_and_kwargs(args, kwargs["model"])
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"optim ({optimizer_in_words(args.optim, None)}) cannot be had here ({one_line(error)}): choose another"
            ) from error
        args.run_name = args.trackers.run_name  # or trackio would give a continued run another name
        # Or Trainer would make the folder, also of what is then refused.
        output_dir, args.output_dir = args.output_dir, os.curdir
        try:
            super().__init__(args=args, **kwargs)
        finally:
            args.output_dir = output_dir
        # Convolutions are faster in this layout: 1.4 times on a CPU (test_resnet, 32 px), and tensor cores want it.
        self.model.to(memory_format=torch.channels_last)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar if sys.stderr.isatty() else ProgressLines)
        self.began_at = 0  # steps of the checkpoint that this training goes on from
        self.add_callback(SetEpoch(self.train_dataset))
        self._stop = SaveAndStop()
        self.add_callback(self._stop)
        self._long_steps = TellOfLongSteps()
        self.add_callback(self._long_steps)  # after the last place where a step waits for all processes
        self._checkpoints = CompleteCheckpoints(lambda: self.batch_layout)
        self.add_callback(self._checkpoints)
        self._diverged_at = torch.tensor(NEVER, device=self.args.device)  # first step with a loss that is not finite

    def trained_model(self) -> PreTrainedModel:
        """The model as its files give it, in single precision: whoever loads them measures the same. For after the training."""
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model

    @property
    def stopped_by(self) -> signal.Signals | None:
        """The signal that ended the training early, if any; what it reached has been saved."""
        return self._stop.stopped_by

    @property
    def batch_layout(self) -> BatchLayout:
        """How this run divides its images into batches, and how far it has come."""
        args = self.args
        return BatchLayout(
            processes=args.world_size,
            per_device_batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            images=self.train_dataset.images_per_epoch,
            workers=max(1, args.dataloader_num_workers) if isinstance(self.train_dataset, IterableDataset) else None,
            epoch=float(self.state.epoch or 0),
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, _ in model.named_parameters()]  # the official optimizer decays everything

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None) -> tuple[Any, dict[str, Any]]:
        rate = {"lr": args.scaled(args.learning_rate)}
        if args.optim == LARS:
            return Lars, rate | parse_arguments(args.optim, args.optim_args)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, settings | rate

    def get_train_dataloader(self) -> DataLoader:
        loader = self.build_train_dataloader()
        self._batches_per_epoch = len(loader)  # the schedule counts in epochs
        return loader

    def build_train_dataloader(self) -> DataLoader:
        """Indexed images in random order, divided over the processes by accelerate."""
        return self.accelerator.prepare(self._loader(self.train_dataset, shuffle=True))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        args = self.args
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.accelerator.prepare(
            self._loader(images, batch_size=args.per_device_eval_batch_size, drop_last=False)
        )

    def _loader(self, images: Any, kind: type[DataLoader] = DataLoader, **kwargs: Any) -> DataLoader:
        args = self.args
        settings = {
            "batch_size": args.per_device_train_batch_size,
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "drop_last": args.dataloader_drop_last,
            "worker_init_fn": outlive_signals,  # instead of transformers' global seed, which no view depends on
        }
        return kind(images, **settings | kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args, optimizer = self.args, optimizer or self.optimizer
        official = args.lr_milestones or (
            args.lr_scheduler_type == SchedulerType.COSINE and not args.get_warmup_steps(num_training_steps)
        )
        if not official:
            return super().create_scheduler(num_training_steps, optimizer)
        steps, milestones = math.ceil(self._batches_per_epoch / args.gradient_accumulation_steps), args.lr_milestones
        if args.warmup_epochs:
            self.lr_scheduler = warmup_schedule(optimizer, steps, num_training_steps, args.warmup_epochs, milestones)
        else:
            self.lr_scheduler = epoch_schedule(optimizer, steps, math.ceil(num_training_steps / steps), milestones)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            # Continued from a checkpoint of the last step, inside an epoch. transformers looks at the end after a step alone.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def forward_and_backward(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Give the parameters the gradients of a batch, and return its loss (scalar): what transformers calls a step."""
        return super().training_step(model, inputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.forward_and_backward(model, inputs, num_items_in_batch)
        # Noted on the device, and looked at when something is logged or saved: asking now would wait for the GPU.
        self._note(loss.isfinite(), self.state.global_step + 1)
        return loss

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self.args.should_save:
            os.makedirs(str(self.args.output_dir), exist_ok=True)
        if resume_from_checkpoint is True:  # Trainer would take the newest, complete or not
            resume_from_checkpoint, _ = newest_complete(Path(str(self.args.output_dir)))
        if resume_from_checkpoint:
            _check_states(Path(str(resume_from_checkpoint)))
        self._diverged_at.fill_(NEVER)
        self.began_at = _steps_of(resume_from_checkpoint) if resume_from_checkpoint else 0
        self.args.resume_from_checkpoint = checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        # Trainer would delete older checkpoints before a new one counts.
        self._checkpoints.limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._stop.receiving(), closing(self._long_steps):
                result = super().train(checkpoint, *args, **kwargs)
        except DataError as error:
            raise TrainingError(
                f"{data_reason(error)}; {self._last_checkpoint()}. Give the same command to continue"
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            if (failure := self._checkpoints.explain(error)) is None:
                raise
            raise TrainingError(
                f"{failure}; {self._last_checkpoint()}. Make room and give the same command to continue"
            ) from error
        finally:
            self.args.save_total_limit = self._checkpoints.limit
        self._check_finite(weights=True)
        if checkpoint and self.began_at == self.state.global_step:
            self._load_rng_state(checkpoint)  # what follows the last step draws what it would have drawn
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        of_step = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if _internal_call and folder == of_step:  # a checkpoint is begun with its model
            self._check_finite(weights=True)
            self._checkpoints.begin(folder)
            super().save_model(str(folder), _internal_call=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder) as fresh:  # transformers would write through a link
            super().save_model(str(fresh), _internal_call=True)

    def save_state(self) -> None:
        if self.args.should_save:
            with whole_file(Path(str(self.args.output_dir)) / TRAINER_STATE_NAME) as fresh:
                self.state.save_to_json(str(fresh))

    def push_to_hub(self, *args, **kwargs) -> str:
        """
        Raises:
            ValueError: always. transformers' own would upload the folder of a run as it is.
        """
        folder = shlex.quote(str(self.args.output_dir))
        raise ValueError(
            f"a trainer does not publish: use `{how_to_run('publish')} {folder} ORG/NAME`, or pretrain with --push_to_hub"
        )

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


def _steps_of(checkpoint: str) -> int:
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return int(state.global_step)


def _check_states(checkpoint: Path) -> None:
    if not (checkpoint / SAFE_WEIGHTS_NAME).is_file():  # Trainer would take a pickle, whatever tensors it has
        raise TrainingError(
            f"{checkpoint} has no {SAFE_WEIGHTS_NAME}, and weights in other files are not loaded: delete it, and the one "
            "before it is used"
        )
    # Trainer ends in a traceback for these, which advises to switch the check for code off.
    for path in chain.from_iterable(checkpoint.glob(name) for name in STATES):
        try:
            check_archive(path)
            with safe_globals(), warnings.catch_warnings(action="ignore"):
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # of tensors the headers alone
        except UNREADABLE as error:
            raise TrainingError(
                f"{path} is damaged, or would run code, and is not loaded: delete {checkpoint}, and the one before it is used"
            ) from error


def train(trainer: SGDTrainer, checkpoint: str | None) -> None:
    """Train to the end, or end the program: with one line for a `TrainingError`, with status 75 after a signal."""
    with one_line_errors((TrainingError,)):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by is not None:
        if trainer.is_world_process_zero():
            name = trainer.stopped_by.name
            print(f"Stopped by {name} at step {trainer.state.global_step}, saved. The same command continues.")
        raise SystemExit(REQUEUE)
