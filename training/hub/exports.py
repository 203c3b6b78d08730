"""A trained model as other libraries load it: timm, transformers' and torchvision's ResNets, ONNX, torch.export.

None needs code of ours.

Tensors get other names and are not changed. Shapes: `N` images, `S` pixels, `D` feature width.
"""

import copy
import math
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from modeling_moco.encoder_moco import build_encoder

from ..engine.files import read_object, write_json
from ..model_folder import bare_name
from .methods import papers_of

Model = MoCoModel | MoCoForImageClassification

RESNETS = {  # block and blocks per stage of those that transformers' ResNet can express
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
# From timm's names to those of transformers' ResNet, in order.
RESNET_NAMES = (
    (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
)
# What timm records of its own making that its callers pass again.
PASSED_BY_CALLERS = ("num_classes", "in_chans", "global_pool")


def encoder_and_classifier(model: Model) -> tuple[Any, nn.Linear | None]:
    """The query encoder, and the classifier of a model that has one."""
    if isinstance(model, MoCoForImageClassification):
        return model.moco.encoder_q, model.classifier
    return model.encoder_q, None


def check_processor(processor: MoCoImageProcessor, source: str) -> None:
    """
    Raises:
        ValueError: images are prepared otherwise than by resizing the short side, cutting out the central square and
            normalising, which is what every format can say.
    """
    ours = MoCoImageProcessor()
    steps = (
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "do_convert_rgb",
        "resample",
        "rescale_factor",
    )
    wrong = {name: getattr(processor, name) for name in steps if getattr(processor, name) != getattr(ours, name)}
    if set(dict(processor.size)) - {"shortest_edge"} or processor.size["shortest_edge"] is None:
        wrong["size"] = dict(processor.size)
    if processor.crop_size["height"] != processor.crop_size["width"]:
        wrong["crop_size"] = dict(processor.crop_size)
    for name, value in wrong.items():
        raise ValueError(
            f"{name} ({value}) in preprocessor_config.json of {source} is not what the other formats do: they resize the "
            "short side bilinearly, cut out the central square and normalise. Restore it"
        )


def data_config(processor: MoCoImageProcessor) -> dict[str, Any]:
    """The evaluation transform in timm's terms."""
    size, resize = processor.crop_size["height"], processor.size["shortest_edge"]
    # timm resizes to floor(size / crop_pct), where rounding can lose a pixel.
    shares = (size / resize, size / (resize + 0.5))
    return {
        "input_size": (3, size, size),
        "interpolation": "bilinear",
        "crop_pct": next(share for share in shares if math.floor(size / share) == resize),
        "crop_mode": "center",
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
    }


def to_timm(model: Model) -> nn.Module | None:
    """The timm model of the same weights, with the classifier as its own; None where timm has no such model.

    timm has no ResNet with the stems for small images, and no name for the classifiers of a few models. The stem of MoCo v3 is
    timm's with other first values, which training keeps.
    """
    encoder, classifier = encoder_and_classifier(model)
    if model.config.stem not in ("default", "moco_v3"):
        return None
    exported = timm.create_model(
        model.config.architecture,
        num_classes=0 if classifier is None else classifier.out_features,
        **(model.config.model_args or {}),
    )
    state = encoder.state_dict()
    if classifier is not None:
        name = exported.pretrained_cfg["classifier"]
        if not isinstance(name, str):
            return None
        state |= {f"{name}.{key}": tensor for key, tensor in classifier.state_dict().items()}
    exported.load_state_dict(state)
    return exported.eval()


def save_timm(model: Model, processor: MoCoImageProcessor, folder: Path, license: str | None = None) -> bool:
    """`config.json` and `model.safetensors` that timm and transformers' TimmWrapper load, with the evaluation transform.

    Args:
        license: of the weights, by the Hub's short name; None says nothing about it.

    Returns:
        whether timm has such a model; if not, nothing is written.
    """
    exported = to_timm(model)
    if exported is None:
        return False
    papers = [f"arXiv:{paper}" for paper in papers_of(model.config.to_dict())]
    told = {"tag": "moco", "paper_ids": papers} | ({} if license is None else {"license": license})
    about: dict[str, Any] = {"pretrained_cfg": told}
    save_for_hf(exported, str(folder), about, safe_serialization=True, data_config=data_config(processor))
    config = read_written(folder / "config.json")
    for name in ("origin_url",) if license else ("origin_url", "license"):
        config["pretrained_cfg"].pop(name, None)  # of timm's weights
    arguments = {key: value for key, value in config.pop("model_args", {}).items() if key not in PASSED_BY_CALLERS}
    arguments |= model.config.model_args or {}
    # For transformers, which asks the configuration of a Hub repository which processor to take.
    # Saved by transformers, a model without arguments would have null for them, which timm cannot read.
    config |= {"image_processor_type": "TimmWrapperImageProcessor", "model_args": arguments}
    config |= _problem(model)
    if isinstance(model, MoCoForImageClassification):
        names = class_names(model)
        config["pretrained_cfg"]["label_names"] = names  # for timm
        config["label_names"] = names  # for transformers
    # transformers' TimmWrapper writes again the `label_names` that it has read, also after a training with other classes. Read
    # as another attribute they are not written, and it writes the names that it has. This key must come before them.
    write_json(folder / "config.json", {"attribute_map": {"label_names": "label_names_as_read"}} | config)
    return True


def _problem(model: Model) -> dict[str, str]:
    """What pipelines of transformers ask a classifier: whether logits become probabilities, and together or one by one."""
    kind = model.config.problem_type
    return {"problem_type": kind} if isinstance(model, MoCoForImageClassification) and kind is not None else {}


def read_written(path: Path) -> dict[str, Any]:
    """A file of the folder that is being published."""
    return read_object(path, "publish again")


def class_names(model: MoCoForImageClassification) -> list[str]:
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def is_resnet_of_transformers(model: Model) -> bool:
    config = model.config
    return bare_name(config.architecture) in RESNETS and config.stem == "default" and not config.model_args


def is_resnet_of_torchvision(model: Model) -> bool:
    """Whether torchvision has this encoder: its ResNets have timm's names, tensors and results."""
    encoder, config = encoder_and_classifier(model)[0], model.config
    known = (
        isinstance(encoder, timm.models.ResNet) and bare_name(config.architecture) in torchvision.models.list_models()
    )
    return known and config.stem == "default" and not config.model_args


def save_torchvision(model: Model, folder: Path) -> None:
    """`model.safetensors` in torchvision's names, with `fc` for a model with a classifier (`is_resnet_of_torchvision`)."""
    exported = to_timm(model)
    assert exported is not None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(exported.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def save_resnet(model: Model, folder: Path, timm_config: dict[str, Any]) -> bool:
    """transformers' `ResNetModel`, or `ResNetForImageClassification` for a model with a classifier.

    Args:
        timm_config: of `save_timm`, whose image processor it shares: those that transformers has for ResNets cut out the
            centre a pixel off in a fifth of all images.

    Returns:
        whether transformers' ResNet can be such a model; if not, nothing is written.
    """
    encoder, classifier = encoder_and_classifier(model)
    config = model.config
    if not is_resnet_of_transformers(model):
        return False
    block, depths = RESNETS[bare_name(config.architecture)]
    widths = [stage["num_chs"] for stage in encoder.feature_info[1:]]
    labels = {} if classifier is None else {"id2label": config.id2label, "label2id": config.label2id}
    resnet_config = ResNetConfig(layer_type=block, depths=depths, hidden_sizes=widths, **labels, **_problem(model))
    state = {_resnet_name(name): tensor for name, tensor in encoder.state_dict().items()}
    if classifier is None:
        exported = ResNetModel(resnet_config)
    else:
        exported = ResNetForImageClassification(resnet_config)
        state = {f"resnet.{name}": tensor for name, tensor in state.items()}
        state |= {f"classifier.1.{name}": tensor for name, tensor in classifier.state_dict().items()}
    exported.load_state_dict(state)
    exported.save_pretrained(folder)
    shared = {key: timm_config[key] for key in ("image_processor_type", "pretrained_cfg")}
    for name in ("config.json", "preprocessor_config.json"):
        path = folder / name
        write_json(path, (read_written(path) if path.is_file() else {}) | shared)
    return True


def _resnet_name(name: str) -> str:
    for pattern, replacement in RESNET_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_network(model: Model) -> nn.Module:
    """A plain module from normalised images (N, 3, S, S) to class logits, or without a classifier to features (N, D)."""
    encoder, classifier = encoder_and_classifier(model)
    config = copy.deepcopy(model.config)
    config.batch_norm = "plain"  # the others have the same state and differ in training alone
    plain = build_encoder(config)
    plain.load_state_dict(encoder.state_dict())
    head = nn.Identity() if classifier is None else copy.deepcopy(classifier)
    return nn.Sequential(plain, head).float().eval()


def output_name(model: Model) -> str:
    return "logits" if isinstance(model, MoCoForImageClassification) else "features"


def export_program(model: Model, size: int) -> torch.export.ExportedProgram:
    """The graph of `to_network`, for any number of images of `size` pixels, without the names of this machine's files."""
    images = torch.randn(2, 3, size, size)
    program = torch.export.export(to_network(model), (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def save_torch_export(program: torch.export.ExportedProgram, folder: Path) -> None:
    """`model.pt2` for `torch.export.load`."""
    folder.mkdir(parents=True, exist_ok=True)
    program.example_inputs = None  # they would be stored as a pickle
    torch.export.save(program, folder / "model.pt2")


def check_onnx() -> None:
    """
    Raises:
        ValueError: packages that the ONNX file takes are not installed.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"onnx (True) needs {', '.join(missing)}: pip install {' '.join(missing)}")


def save_onnx(program: torch.export.ExportedProgram, size: int, output: str, folder: Path) -> float:
    """`model.onnx` and its weights in `model.onnx.data`, for any number of images.

    Args:
        program: of `export_program`.
        output: name of what it returns, "logits" or "features".

    Returns:
        the largest difference in onnxruntime, over one image and over three.

    Raises:
        ValueError: packages that it takes are not installed, or the difference is above 1e-5 of the largest output.
    """
    check_onnx()
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(
            program,
            f=folder / "model.onnx",
            input_names=["pixel_values"],
            output_names=[output],
            external_data=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    network, worst = program.module(), 0.0
    for n in (1, 3):
        images = torch.randn(n, 3, size, size)
        with torch.no_grad():
            expected = network(images)
        found = torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
        difference = (found - expected).abs().max().item()
        if difference > 1e-5 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the ONNX model differs by {difference:.1e}: leave out --onnx")
        worst = max(worst, difference)
    return worst
