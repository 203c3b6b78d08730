"""The weights that a pretraining run begins with, where they are not random: what fits is taken, all else is said."""

import hashlib
import sys
from dataclasses import dataclass, field

import torch

from modeling_moco import MoCoConfig, MoCoModel

from ..model_folder import bare_name
from .detect import Checkpoint
from .files import read
from .key_maps import State
from .shapes import few

PREFIXES = ("hf-hub:", "local-dir:")  # that timm writes before the name of a repository or a folder
OF_SHAPES = ("img_size", "patch_size")  # model_args that are seen by the tensors, which are then resampled
KEY_SIDE = ("encoder_k", "projector_k")
NOT_TAKEN = {
    "projector_q": "the projector is new",
    "encoder_k": "the key encoder is a copy of the query encoder",
    "predictor_q": "the predictor is new",
    "dictionary": "the {} is new",
}


@dataclass
class Start:
    """Weights to begin with.

    Args:
        checkpoint: in the names of [`MoCoModel`].
        notes: sentences about what a model took of it, and what it did not.
        has_queue: whether the model took its queue.
    """

    checkpoint: Checkpoint
    notes: list[str] = field(default_factory=list)
    has_queue: bool = False

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that stand for all its tensors, and for the mean and std of its images."""
        config = self.checkpoint.config
        digest = hashlib.sha256(repr([*config.image_mean, *config.image_std]).encode())
        for name, tensor in sorted(self.checkpoint.state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def read_start(source: str, config: MoCoConfig) -> Start:
    """Read the weights for a model of this configuration.

    Args:
        source: a folder or Hub repository of this project or of timm, or a file that `convert` knows.

    Raises:
        ValueError: there are none, they are damaged, of a classifier, of another architecture, or of other heads of attention.
    """
    for prefix in PREFIXES:
        source = source.removeprefix(prefix)
    checkpoint = read(source, timm_too=True)
    if checkpoint.is_classifier or checkpoint.is_detector:
        kind = "classifier" if checkpoint.is_classifier else "detector"
        raise ValueError(
            f"init_from ({source}) is a {kind}, whose encoder may have seen labels: pass the pretrained encoder that it "
            "was made from"
        )
    there = checkpoint.config.architecture
    if bare_name(there) != bare_name(config.architecture):
        raise ValueError(
            f"init_from ({source}) is a {there}, but this run trains a {config.architecture}: pass --architecture {there}, or "
            "other weights"
        )
    heads, wanted = (_heads(each) for each in (checkpoint.config, config))
    if heads != wanted:
        raise ValueError(
            f"init_from ({source}) is a {there} with model_args num_heads={heads}, but this run has num_heads={wanted}: pass "
            "them to --model_args as they are there, or other weights"
        )
    return Start(checkpoint, [note for note in checkpoint.notes if note.startswith("left out")])


def _heads(config: MoCoConfig) -> int | None:
    # A ViT with other heads computes nothing of what it did. Other arguments that no shape shows are noted.
    return (config.model_args or {}).get("num_heads")


@torch.no_grad()
def begin_with(model: MoCoModel, start: Start) -> None:
    """Copy to a new model what fits of the weights, and note the rest.

    The projector is taken whole or not at all. The key encoder is taken if all of the query encoder and the projector are,
    else it is a copy of the query encoder; the queue, which the key encoder has made, only together with it.
    """
    here = model.state_dict()
    there = _resampled(model, start)
    there.pop("dictionary.bank", None)  # it is of other images
    fits = {name: x for name, x in there.items() if name in here and x.shape == here[name].shape}
    whole = {part for part in _parts(here) if _names(here, part) == _names(there, part) == _names(fits, part)}
    taken = {"encoder_q"} | (whole & {"projector_q"})
    if {"encoder_q", "projector_q", *_parts(here).intersection(KEY_SIDE)} <= whole:
        taken |= whole
    model.load_state_dict({name: x for name, x in fits.items() if name.split(".")[0] in taken}, strict=False)
    if model.has_key_encoder and not taken.issuperset(KEY_SIDE):
        model.reset_key_encoder()
    start.has_queue = "dictionary" in taken
    start.notes += [
        *_notes(here, there, fits, taken, model.config.dictionary),
        *_settings(model.config, start.checkpoint.config),
    ]


def _resampled(model: MoCoModel, start: Start) -> State:
    """The weights with the encoders' as timm fits them to another size of image, where it knows how."""
    fit = getattr(sys.modules[type(model.encoder_q).__module__], "checkpoint_filter_fn", lambda state, encoder: state)
    state = dict(start.checkpoint.state)
    for part in ("encoder_q", "encoder_k"):
        old = {name.removeprefix(f"{part}."): x for name, x in state.items() if name.startswith(f"{part}.")}
        new = {f"{part}.{name}": x for name, x in (fit(old, model.encoder_q) if old else {}).items()}
        changed = [name for name, x in new.items() if name in state and x.shape != state[name].shape]
        if part == "encoder_q":
            start.notes += [f"resampled: {_shape(name, state[name])} to {tuple(new[name].shape)}" for name in changed]
        state |= new
    return state


def _notes(here: State, there: State, fits: State, taken: set[str], dictionary: str) -> list[str]:
    def differs(name: str) -> str:
        return f"{_shape(name, here[name])} is {tuple(there[name].shape) if name in there else 'not'} there"

    missed = [name for name in here if name not in fits and not name.endswith("num_batches_tracked")]
    new = [differs(name) for name in missed if name.startswith("encoder_q.")]
    notes = [f"new in the encoder: {few(new)}"] if new else []
    for part, words in NOT_TAKEN.items():
        if part not in _parts(here):
            continue
        words = words.format(dictionary)
        if part not in taken and part not in _parts(there):
            notes.append(words)
        elif part not in taken:
            more = sorted(_names(there, part) - _names(here, part))
            reasons = [differs(name) for name in missed if name.startswith(f"{part}.")]
            reasons += [f"{_shape(name, there[name])} is not here" for name in more]
            notes.append(f"{words}: {next(iter(reasons), 'it depends on the parts above')}")
    spare = [name for name in there if name.startswith("encoder_q.") and name not in here]
    return notes + ([f"left out: {few(spare)}"] if spare else [])


def _settings(here: MoCoConfig, there: MoCoConfig) -> list[str]:
    """Notes on what the encoder computes by its settings, whichever tensors it has."""
    notes = [f"the stem is {here.stem!r} here and {there.stem!r} there"] if here.stem != there.stem else []
    ours, theirs = (
        {name: value for name, value in (config.model_args or {}).items() if name not in OF_SHAPES}
        for config in (here, there)
    )
    return notes + ([f"model_args are {ours} here and {theirs} there"] if ours != theirs else [])


def _names(state: State, part: str) -> set[str]:
    return {name for name in state if name.startswith(f"{part}.")}


def _parts(state: State) -> set[str]:
    return {name.split(".")[0] for name in state}


def _shape(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {tuple(tensor.shape)}"
