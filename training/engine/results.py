"""Results that travel: every evaluation appends what it measured, and under which conditions, to a model's results.json."""

import hashlib
import json
import math
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import world_size
from modeling_moco.modeling_moco import MoCoPreTrainedModel

from ..cli import cores
from ..errors import hide_secrets
from .files import inside, read_json, write_json
from .run_folder import RESULTS

Feature = Literal["backbone", "head"]  # the pooled output (D wide), or the unit-length projection (projection_dim wide)


def behind(model: MoCoModel, feature: Feature) -> list[nn.Module]:
    """The modules that make a feature of an image."""
    return [model.encoder_q] + ([model.projector_q] if feature == "head" else [])


def encoder_digest(model: MoCoModel, feature: Feature = "backbone") -> str:
    """Sixteen hexadecimal digits that stand for the weights and statistics behind a feature."""
    return _digest(behind(model, feature), model.config)


def model_digest(model: MoCoPreTrainedModel) -> str:
    """Sixteen hexadecimal digits that stand for all weights and statistics of a model, as a detector."""
    return _digest([model], model.config)


def _digest(modules: list[nn.Module], config: MoCoConfig) -> str:
    digest = hashlib.sha256(json.dumps([config.image_mean, config.image_std]).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor = tensor.float()  # evaluations compute in single precision with the same weights
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


KINDS: dict[str, Any] = {  # of the values that every entry of the file has
    **dict.fromkeys(("protocol", "metric", "feature", "model", "date", "hardware"), str),
    **{"value": int | float, "n": int, "interval": list, "settings": dict, "seed": int | None, "data": dict},
}
KINDS_OF_DATA: dict[str, Any] = {  # of what an entry says of its images; the first two are always there
    **{"dataset": str, "split": str | None, "local": bool | None},
    **dict.fromkeys(("config", "label_column", "view", "split_revision"), str | None),
}
OF_PIXELS = ("mIoU", "pixel accuracy")  # metrics of segmentation models
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "scikit-learn")


@dataclass(frozen=True)
class Result:
    """One number.

    Args:
        protocol: what was done, so that two results with the same words can be compared.
        metric: "top1" or "top5"; of detectors an AP, such as "box AP50"; one of `OF_PIXELS`.
        value: per cent.
        n: images it was measured on.
        feature: of the encoder, "backbone" or "head".
        settings: what the protocol leaves open.
        seed: of whatever was drawn.
    """

    protocol: str
    metric: str
    value: float
    n: int
    feature: str = "backbone"
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


def interval(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, all in per cent: which accuracies of the same model on other images to expect."""
    z, p = 1.959964, value / 100
    centre, margin = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (100 * (centre + sign * margin) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(100.0, high)


def has_interval(metric: str) -> bool:
    """Whether a metric is a share of images. An AP is none, nor what counts pixels: several trainings show how they vary."""
    return metric not in OF_PIXELS and not metric.split()[-1].startswith("AP")


def table(results: list[Result]) -> str:
    """Results as lines of text: protocol, feature, metric, value, 95 % interval where there is one, images."""
    rows = []
    for r in results:
        low, high = interval(r.value, r.n)
        spread = f"95 %: {low:.2f} to {high:.2f}" if has_interval(r.metric) else ""
        rows.append((r.protocol, r.feature, r.metric, f"{r.value:.2f} %", spread, f"n {r.n:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def append_results(folder: Path, results: list[Result], *, model: str, data: dict[str, Any]) -> None:
    """Append results to `folder/results.json`. One that is there with all its conditions is not repeated.

    Args:
        model: digest of the weights (`encoder_digest`).
        data: `ImageSplits.about`.

    Raises:
        ValueError: the file is there and is not a valid results file; it is left as it is.
    """
    here = {"model": model, "data": data} | conditions()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(inside(folder / f".{RESULTS}.lock")):  # two evaluations may end together
        known = read_results(folder)
        seen = [_without_date(entry) for entry in known]
        for result in results:
            ends = interval(result.value, result.n) if has_interval(result.metric) else ()
            entry = json.loads(json.dumps(asdict(result) | {"interval": ends} | here))
            if entry not in seen:
                known.append(entry | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
        write_json(folder / RESULTS, known)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of a model, oldest first; none without a file.

    Raises:
        ValueError: the file is not a valid results file.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    remedy = "correct it, or move it away, and a new one is written"
    results = read_json(path, remedy, "a valid results file")
    if not isinstance(results, list):
        raise ValueError(f"{path} is not a valid results file (no list): {remedy}")
    for number, entry in enumerate(results, 1):
        if (defect := _defect(entry)) is not None:
            raise ValueError(f"{path} is not a valid results file (entry {number} {defect}): {remedy}")
    return results


def _defect(entry: Any) -> str | None:
    """What is wrong with an entry; None where it has all that reports and cards show, each of its kind."""
    if not isinstance(entry, dict):
        return "has no names and values"
    if missing := [name for name in KINDS if name not in entry]:
        return f"has no {missing[0]}"
    wrong = [name for name, kind in KINDS.items() if not isinstance(entry[name], kind)]
    if wrong:
        return f"has a {wrong[0]} of another kind"
    ends, data = entry["interval"], entry["data"]
    if missing := [name for name in ("dataset", "split") if name not in data]:
        return f"has no {missing[0]} in its data"
    if wrong := [name for name, kind in KINDS_OF_DATA.items() if name in data and not isinstance(data[name], kind)]:
        return f"has a {wrong[0]} of another kind in its data"
    if len(ends) not in (0, 2) or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        return "has an interval of another kind"
    if not math.isfinite(entry["value"]) or entry["n"] < 1 or not entry["metric"].strip():
        return "has a value, a number of images or a metric that nothing measures"
    return None


def spread(entry: dict[str, Any]) -> str:
    """The interval of an entry in words; a dash where it has none."""
    return "{:.2f} to {:.2f}".format(*entry["interval"]) if entry["interval"] else "–"


def _without_date(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "date"}


def conditions() -> dict[str, Any]:
    """What a number was measured with: command, versions, hardware, processes, commit."""
    return {
        "command": _command(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": _hardware(),
        "processes": world_size(),
        "commit": _commit(),
    }


def _command() -> str:
    words, hide = [], False
    for word in sys.argv:
        flag, equals, _ = word.partition("=")
        words.append("***" if hide else f"{flag}=***" if "token" in flag and equals else hide_secrets(word))
        hide = "token" in flag and not equals
    return shlex.join(words)


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cores()} CPU cores, {platform.machine()}"


def _commit() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # or it is installed within a checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
