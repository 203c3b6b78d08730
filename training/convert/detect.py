"""What a checkpoint holds: its kind by the names of its tensors, the encoder, head, K and dim by their shapes.

Files are read with `torch.load(weights_only=True)`, which makes tensors and plain values and runs nothing.
"""

import pickle
import re
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoModel
from modeling_moco.modeling_moco import build_encoder, build_projector

from .key_maps import CLASSIFIER, FOREIGN, LAYOUTS, OFFICIAL, RESNETS, WRAPPED, Layout, State, rename

KNOWN = ("epoch", "arch", "best_acc1")  # what official files say of themselves
PUBLISHED = {"linear": ("v1", 0.07), "mlp": ("v2", 0.2)}  # version and temperature that belong to a projection head
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# What torch.load raises for files that were cut off, changed or are something else.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, MemoryError, OverflowError, SafetensorError),
)


@dataclass
class Checkpoint:
    """What was read.

    Args:
        source: file, folder or Hub repository.
        title: what kind of checkpoint it is.
        config: of the model.
        state: tensors under the names of [`MoCoModel`], or of [`MoCoForImageClassification`], and in its order. Projectors,
            key encoder and queue may be absent.
        about: what else is known, see `KNOWN`; of official files also the `prefix` of their names, `module.` or none.
        notes: what was not taken as it is.
    """

    source: str
    title: str
    config: MoCoConfig
    state: State
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_classifier(self) -> bool:
        return "classifier.weight" in self.state

    @property
    def parts(self) -> set[str]:
        return {name.split(".")[0] for name in self.state}

    def empty_model(self) -> MoCoModel | MoCoForImageClassification:
        """The model that this is the state of, on the meta device."""
        with torch.device("meta"):
            return MoCoForImageClassification(self.config) if self.is_classifier else MoCoModel(self.config)

    def checked(self) -> "Checkpoint":
        """Itself with tensors that share no memory, if they fit together.

        Raises:
            ValueError: one is missing, unexpected, of another shape or of another kind of number.
        """
        parts = self.parts | ({"moco", "classifier"} if self.is_classifier else {"encoder_q"})
        if parts & {"encoder_k", "projector_k"}:
            parts |= {"encoder_k", "projector_k"}
        expected = {k: x for k, x in self.empty_model().state_dict().items() if k.split(".")[0] in parts}
        wrong = _differences(self.state, expected) or [
            f"{name} is {self.state[name].dtype}, not {_number(tensor)}"
            for name, tensor in expected.items()
            if _number(self.state[name]) != _number(tensor)
        ]
        if wrong:
            raise ValueError(
                f"{self.source} ({self}) does not fit together: {_few(wrong)}. It is damaged, or another model"
            )
        copies = {name: self.state[name].detach().clone(memory_format=torch.contiguous_format) for name in expected}
        return replace(self, state=copies)

    def __str__(self) -> str:
        config = self.config
        words = [self.title, config.architecture]
        if self.is_classifier:
            words.append(f"{config.num_labels:,} classes")
        elif "projector_q" in self.parts:
            words[0] += f" {PUBLISHED[config.projection_head][0]}"
            words += [f"K {config.queue_size:,}"] if "dictionary" in self.parts else []
            words.append(f"dim {config.projection_dim}")
        words += [f"{key} {value:g}" for key, value in self.about.items() if isinstance(value, int | float)]
        return ", ".join(words)


def read_file(path: Path) -> Checkpoint:
    """A checkpoint of any kind in `LAYOUTS`.

    Raises:
        ValueError: it is damaged, of another kind, or asks for code; its tensors do not fit together.
    """
    content = _load(path)
    layout, there, prefix = _recognise(path, content)
    left_out = [name for name in there if name.startswith(layout.left_out)]
    unknown = [name for name in there if name not in left_out and rename(name, layout.names) is None]
    if unknown:
        raise ValueError(
            f"{path} ({layout.title}) holds {_few(unknown)}, for which MoCo has no place: it is another model"
        )
    state = {rename(name, layout.names) or "": tensor for name, tensor in there.items() if name not in left_out}
    notes = [f"left out: {_few(left_out)}"] if left_out else []
    queue = state.get("dictionary.queue")
    if queue is not None and queue.dim() == 3 and len(queue) == 2:
        state["dictionary.queue"] = queue[0]
        notes.append("of its two queues, one for each view, the first is kept")
    about = known_values(content) | ({"prefix": prefix} if layout.names in (OFFICIAL, CLASSIFIER) else {})
    classifier = "classifier.weight" in state
    architecture = recognise_resnet(path, _part(state, "moco.encoder_q." if classifier else "encoder_q."))
    if classifier:
        notes += _check_linear(path, content)
        config = MoCoConfig(architecture=architecture, num_labels=_length(state["classifier.weight"]))
    else:
        config, state, remarks = _recognise_moco(architecture, state)
        notes += remarks
    if about.get("arch", config.architecture) != config.architecture:
        notes.append(f"it calls itself {about['arch']}, but its tensors are those of {config.architecture}")
    return Checkpoint(str(path), layout.title, config, state, about, notes).checked()


def known_values(content: dict[Any, Any]) -> dict[str, Any]:
    """Of a checkpoint, or of what was kept of it: the values that `KNOWN` names, if they are numbers and `arch` a name."""
    values = {key: content[key] for key in KNOWN if key in content}
    for key, value in values.items():
        if _is_plain(value) and value.numel() == 1:
            values[key] = value.item()
    arch = values.pop("arch", None)
    printable = isinstance(arch, str) and re.fullmatch(r"[\w.-]+", arch)  # it goes to the terminal
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return numbers | ({"arch": arch} if printable else {})


def _load(path: Path) -> dict[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive, which is then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error}): check the disk and its permissions, or copy it again"
        ) from error
    except UNREADABLE as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise ValueError(
                f"{path} asks for {asked[1]}, which tensors do not need and which may run code: it is not loaded. Ask for a "
                "file with the state_dict alone"
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is no file of torch.save, or a damaged one: download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint: {_convertible()}")
    return content


def _recognise(path: Path, content: dict[Any, Any]) -> tuple[Layout, State, str]:
    """The kind of a checkpoint, its tensors, and what stood before their names."""
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise ValueError(f"{path} holds a {type(inner).__name__} as state_dict, not tensors: {_convertible()}")
    state = {str(name).removeprefix(WRAPPED): tensor for name, tensor in inner.items()}
    names = [*state, *map(str, content)]

    def has(marks: Iterable[str]) -> bool:
        return all(any(name.startswith(mark) for name in names) for mark in marks)

    layout = next((layout for layout in LAYOUTS if has(layout.marks)), None)
    if layout is None:
        what = next((what for marks, what in FOREIGN if has(marks)), f"nothing that is known ({_few(list(state))})")
        raise ValueError(f"{path} holds {what}: {_convertible()}")
    bare = [str(name) for name in inner if not str(name).startswith(WRAPPED)]
    if 0 < len(bare) < len(inner):
        raise ValueError(
            f"{path} ({layout.title}) holds {_few(bare)} without {WRAPPED} before the name, and other tensors with it: delete "
            "one of the two kinds, or rename it"
        )
    wrong = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if wrong:
        raise ValueError(
            f"{path} ({layout.title}) holds {_few(wrong)}, which are no plain tensors (but sparse, quantised, without data or "
            "no tensors at all): ask for a file with dense ones"
        )
    return layout, state, "" if bare else WRAPPED


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # and not meta
        and not value.is_quantized
        and not value.is_nested
    )


def _check_linear(path: Path, content: dict[Any, Any]) -> list[str]:
    """Remarks on a ResNet with a classifier, if fc alone was trained: pytorch/examples writes files of the same layout."""
    try:
        trained = sum(len(group["params"]) for group in content["optimizer"]["param_groups"])
    except (LookupError, TypeError):
        trained = 0
    if trained > 2:
        raise ValueError(
            f"{path} holds a supervised ResNet (its optimizer has {trained} parameters, a linear classifier's has fc.weight "
            "and fc.bias): timm and torchvision load it themselves"
        )
    return [] if trained == 2 else ["it has no optimizer of fc: whether MoCo trained the encoder cannot be told"]


def _convertible() -> str:
    return f"what can be converted is {', '.join(layout.title for layout in LAYOUTS)}"


def _recognise_moco(architecture: str, state: State) -> tuple[MoCoConfig, State, list[str]]:
    """Configuration by the projection head and the queue, what is kept of the state, and remarks on both."""
    head = _part(state, "projector_q.")
    for kind, (_, temperature) in PUBLISHED.items():
        config = MoCoConfig(architecture=architecture, projection_head=kind, temperature=temperature)
        last = head.get("weight" if kind == "linear" else "2.weight")
        config.projection_dim = config.projection_dim if last is None else _length(last)
        with torch.device("meta"):
            projector = build_projector(config, build_encoder(config).head_hidden_size)
        if not _differences(head, projector.state_dict()):
            break
    else:  # a queue and a key encoder mean nothing without the head that made the keys
        kept = {name: tensor for name, tensor in state.items() if name.startswith("encoder_q.")}
        shapes = _few([f"{name} {tuple(tensor.shape)}" for name, tensor in head.items()]) or "none at all"
        remark = (
            f"only the encoder is kept: the projection head ({shapes}) is not one of MoCo's, and the keys belong to it"
        )
        return MoCoConfig(architecture=architecture), kept, [remark]
    version = PUBLISHED[config.projection_head][0]
    published = f"T {config.temperature:g} and m {config.key_momentum:g} are {version}'s as published"
    remarks = [f"{published}: a checkpoint has neither"]
    if "dictionary.queue" in state:
        config.queue_size = _length(state["dictionary.queue"], axis=-1)
    else:
        remarks.append("it has no queue: loading the model begins a fresh one")
    if not _part(state, "encoder_k."):
        remarks.append("it has no key encoder: loading the model copies the query encoder")
    return config, state, remarks


def recognise_resnet(path: Path, encoder: State) -> str:
    """Name of the ResNet whose tensors have these names and shapes."""
    if "conv1.weight" in encoder and encoder["conv1.weight"].shape[2:] == (3, 3):
        raise ValueError(
            f"{path} begins with a 3x3 convolution and does not say how it pads (solo-learn by 2, the official notebook by "
            "1): only ResNets as torchvision builds them can be converted"
        )
    wrong = {}
    for name in RESNETS:
        wrong[name] = _differences(encoder, _resnet_state(name))
        if not wrong[name]:
            return name
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    raise ValueError(
        f"{path} holds no ResNet of torchvision's; against {nearest}, {_few(wrong[nearest])}. It is damaged or another model"
    )


@cache
def _resnet_state(architecture: str) -> State:
    with torch.device("meta"):
        return build_encoder(MoCoConfig(architecture=architecture)).state_dict()


def _part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _length(tensor: torch.Tensor, axis: int = 0) -> int:
    return max(1, tensor.shape[axis]) if tensor.dim() else 1


def _differences(state: State, expected: State) -> list[str]:
    """One phrase for every tensor that is missing, too many or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return [
        *(f"{name} is missing" for name in wanted if name not in shapes),
        *(f"{name} is unexpected" for name in shapes if name not in wanted),
        *(
            f"{name} is {shapes[name]}, not {wanted[name]}"
            for name in wanted
            if shapes.get(name, wanted[name]) != wanted[name]
        ),
    ]


def _number(tensor: torch.Tensor) -> str:
    return "floating point" if tensor.is_floating_point() else "integer" if tensor.dtype in INTEGERS else "neither"


def _few(phrases: list[str]) -> str:
    printable = [repr(phrase)[1:-1] for phrase in phrases[:3]]  # names come from files, and go to the terminal
    return ", ".join(printable) + (f" and {len(phrases) - 3:,} more" if len(phrases) > 3 else "")
