"""Recognise a checkpoint: its kind by the names of its tensors; encoder, head, K and dimension by their shapes.

Files are read with `torch.load(weights_only=True)`, which returns tensors and plain values and runs no code.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modeling_moco import (
    MoCoConfig,
    MoCoForImageClassification,
    MoCoForObjectDetection,
    MoCoModel,
    MoCoRCNNConfig,
)

from ..engine.files import UNREADABLE, check_archive
from ..model_folder import check_finite
from .detectors import recognise_detector
from .key_maps import (
    CLASSIFIER_VIT,
    DETECTOR,
    FOREIGN,
    LAYOUTS,
    OF_THE_OFFICIAL_CODE,
    OFFICIAL_ARCH,
    OFFICIAL_V3,
    OFFICIAL_V3_VIT,
    WRAPPED,
    Layout,
    State,
    rename,
)
from .shapes import differences, few, length, part, recognise_encoder, recognise_moco, recognise_v3

KNOWN = ("epoch", "arch", "best_acc1")  # values that official files contain beside the tensors
VERSIONS = {  # of MoCo, by dictionary, key encoder and projection head
    ("queue", "momentum", "linear"): "v1",
    ("queue", "momentum", "mlp"): "v2",
    ("batch", "momentum", "mlp_bn"): "v3",
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class Checkpoint:
    """A checkpoint in the names of this project.

    Args:
        source: file, folder or Hub repository.
        title: name of its kind.
        config: of the model.
        state: tensors under the names of [`MoCoModel`], or of [`MoCoForImageClassification`] or [`MoCoForObjectDetection`],
            and in its order. Projectors, key encoder and queue may be absent.
        about: other known values, see `KNOWN`; for official files also the `prefix` of their names, `module.` or empty.
        notes: sentences about what the conversion changed, assumed or left out.
    """

    source: str
    title: str
    config: MoCoConfig
    state: State
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_classifier(self) -> bool:
        """Whether it has a linear classifier."""
        return "classifier.weight" in self.state

    @property
    def is_detector(self) -> bool:
        """Whether it is a detector around an encoder."""
        return isinstance(self.config, MoCoRCNNConfig)

    @property
    def parts(self) -> set[str]:
        """Names of its top-level modules."""
        return {name.split(".")[0] for name in self.state}

    def empty_model(self) -> MoCoModel | MoCoForImageClassification | MoCoForObjectDetection:
        """A model for this state, on the meta device."""
        with torch.device("meta"):
            if isinstance(self.config, MoCoRCNNConfig):
                return MoCoForObjectDetection(self.config)
            return MoCoForImageClassification(self.config) if self.is_classifier else MoCoModel(self.config)

    def checked(self) -> "Checkpoint":
        """A copy whose tensors share no memory, after a check that they make a model.

        Raises:
            ValueError: a tensor is missing or unexpected, has another shape or another kind of number, or is not finite.
        """
        parts = self.parts | ({"moco", "classifier"} if self.is_classifier else {"encoder_q"})
        if parts & {"encoder_k", "projector_k"}:
            parts |= {"encoder_k", "projector_k"}
        expected = self.empty_model().state_dict()
        if not self.is_detector:
            expected = {k: x for k, x in expected.items() if k.split(".")[0] in parts}
        wrong = differences(self.state, expected) or [
            f"{name} is {self.state[name].dtype}, not {_number(tensor)}"
            for name, tensor in expected.items()
            if _number(self.state[name]) != _number(tensor)
        ]
        if wrong:
            raise ValueError(
                f"{self.source} ({self}) is not a complete model: {few(wrong)}. It is damaged or another model: download or "
                "copy it again"
            )
        check_finite(self.source, self.state)
        copies = {name: self.state[name].detach().clone(memory_format=torch.contiguous_format) for name in expected}
        return replace(self, state=copies)

    def __str__(self) -> str:
        config = self.config
        words = [self.title, config.architecture]
        if isinstance(config, MoCoRCNNConfig):
            words += [config.rcnn_variant, f"{config.num_labels:,} classes", *(["masks"] if config.masks else [])]
        elif self.is_classifier:
            words.append(f"{config.num_labels:,} classes")
        elif "projector_q" in self.parts:
            method = (config.dictionary, config.key_encoder, config.projection_head)
            words[0] += f" {VERSIONS.get(method) or 'with ' + ', '.join(method)}"
            words += [f"K {config.queue_size:,}"] if "dictionary" in self.parts else []
            words.append(f"dim {config.projection_dim}")
        words += [f"{key} {value:g}" for key, value in self.about.items() if isinstance(value, int | float)]
        return ", ".join(words)


def read_file(path: Path) -> Checkpoint:
    """Read a checkpoint file of any kind in `LAYOUTS`.

    Raises:
        ValueError: the file is damaged, is of another kind or needs code; or its tensors are not a complete model.
    """
    content = _load(path)
    layout, there, prefix = _recognise(path, content)
    left_out = [name for name in there if name.startswith(layout.left_out)]
    unknown = [name for name in there if name not in left_out and rename(name, layout.names) is None]
    if unknown:
        raise ValueError(
            f"{path} ({layout.title}) contains {few(unknown)}, which MoCo does not have: it is another model. {_convertible()}"
        )
    state = {rename(name, layout.names) or "": tensor for name, tensor in there.items() if name not in left_out}
    notes = [f"left out: {few(left_out)}"] if left_out else []
    queue = state.get("dictionary.queue")
    if queue is not None and queue.dim() == 3 and len(queue) == 2:
        state["dictionary.queue"] = queue[0]
        notes.append("it has two queues, one for each view: the first is kept")
    about = known_values(content) | ({"prefix": prefix} if layout.names in OF_THE_OFFICIAL_CODE else {})
    if "classifier.weight" in state:
        notes += _check_linear(
            path, content, *(("ViT", "head") if layout.names == CLASSIFIER_VIT else ("ResNet", "fc"))
        )
    if layout.names == DETECTOR:
        config, state, remarks = recognise_detector(path, state, {name: there[name] for name in left_out})
    else:
        config, state, remarks = recognise(path, layout, state, about.get("arch"))
    notes += remarks
    if about.get("arch", config.architecture) not in (config.architecture, OFFICIAL_ARCH.get(config.architecture)):
        notes.append(f"its arch is {about['arch']}, but its tensors are those of {config.architecture}")
    return Checkpoint(str(path), layout.title, config, state, about, notes).checked()


def recognise(path: Path, layout: Layout, state: State, arch: str | None) -> tuple[MoCoConfig, State, list[str]]:
    """The configuration of the tensors of a file, the part of them that is kept, and notes.

    Args:
        path: for messages.
        state: in the names of this project.
        arch: the name that the file gives its encoder.

    Raises:
        ValueError: the encoder is unknown.
    """
    classifier = state.get("classifier.weight")
    encoder = recognise_encoder(path, part(state, "encoder_q." if classifier is None else "moco.encoder_q."), arch)
    if classifier is not None:
        return MoCoConfig(**encoder.settings, num_labels=length(classifier)), state, encoder.notes
    return (recognise_v3 if layout.names in (OFFICIAL_V3, OFFICIAL_V3_VIT) else recognise_moco)(encoder, state)


def known_values(content: dict[Any, Any]) -> dict[str, Any]:
    """The values of `KNOWN` in a checkpoint or in a saved part of it: finite numbers, and `arch` if it is a name."""
    values = {key: content[key] for key in KNOWN if key in content}
    for key, value in values.items():
        if _is_plain(value) and value.numel() == 1:
            values[key] = value.item()
    arch = values.pop("arch", None)
    printable = isinstance(arch, str) and re.fullmatch(r"[\w.-]+", arch)  # it is printed on the terminal
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and abs(value) < 2**63}
    return numbers | ({"arch": arch} if printable else {})


def _load(path: Path) -> dict[Any, Any]:
    try:
        check_archive(path)
        content = _unpickled(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error}): check the disk and its permissions, or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a checkpoint: {_convertible()}")
    return content


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a TorchScript archive, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if path.suffix == ".pkl":  # of detectron2, which are of arrays: torch reads no newer pickles than its own
            raise ValueError(
                f"{path} is a pickle, which may run code, so that it is not loaded: if you trust it, save its arrays as "
                'tensors by torch.save({"model": tensors}, "model.pth")'
            ) from error
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise ValueError(
                f"{path} needs {asked[1]}, which is not a tensor and may run code, so that it is not loaded: ask its author "
                "for a file with the state_dict alone"
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a torch checkpoint, or is damaged: download or copy it again"
        ) from error


def _recognise(path: Path, content: dict[Any, Any]) -> tuple[Layout, State, str]:
    """The kind of a checkpoint, its tensors, and the prefix that was removed from their names."""
    key = next((key for key in ("state_dict", "model") if key in content), None)
    inner = content if key is None else content[key]
    if not isinstance(inner, dict):
        raise ValueError(f"{path} contains a {type(inner).__name__} as {key}, not tensors: {_convertible()}")
    state = {str(name).removeprefix(WRAPPED): tensor for name, tensor in inner.items()}
    names = [*state, *map(str, content)]

    def has(signature: Iterable[str]) -> bool:
        return all(any(name.startswith(start) for name in names) for start in signature)

    layout = next((layout for layout in LAYOUTS if has(layout.signature)), None)
    if layout is None:
        what = next((what for signature, what in FOREIGN if has(signature)), f"unknown names ({few(list(state))})")
        raise ValueError(f"{path} contains {what}: {_convertible()}")
    bare = [str(name) for name in inner if not str(name).startswith(WRAPPED)]
    if 0 < len(bare) < len(inner):
        raise ValueError(
            f"{path} ({layout.title}) contains {few(bare)} without the prefix {WRAPPED}, and other tensors with it: delete "
            "one of the two kinds, or rename it"
        )
    wrong = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if wrong:
        raise ValueError(
            f"{path} ({layout.title}) contains {few(wrong)}, which are not dense tensors with data: ask its author for a file "
            "with dense tensors"
        )
    return layout, state, "" if bare else WRAPPED


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # a tensor on the meta device has no data
        and not value.is_quantized
        and not value.is_nested
        # or one number of the file, shown a billion times, would become a copy of a billion
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _check_linear(path: Path, content: dict[Any, Any], kind: str, head: str) -> list[str]:
    """Refuse a supervised network, which pytorch/examples saves in the same layout, and return notes on a classifier.

    Raises:
        ValueError: the optimizer has more parameters than those of the head.
    """
    try:
        trained = sum(len(group["params"]) for group in content["optimizer"]["param_groups"])
    except (LookupError, TypeError):
        trained = 0
    if trained > 2:
        raise ValueError(
            f"{path} contains a supervised {kind} (its optimizer has {trained} parameters, that of a linear classifier "
            f"has {head}.weight and {head}.bias alone): load it with timm or torchvision"
        )
    if trained == 2:
        return []
    return [f"it has no optimizer of {head}, so that the encoder may be supervised and not MoCo's"]


def _convertible() -> str:
    return f"what can be read: {', '.join(dict.fromkeys(layout.title for layout in LAYOUTS))}"


def _number(tensor: torch.Tensor) -> str:
    return "floating point" if tensor.is_floating_point() else "integer" if tensor.dtype in INTEGERS else "neither"
