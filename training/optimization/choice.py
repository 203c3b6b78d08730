"""Which optimizer a run has: the names of `--optim`, and what `--optim_args` may say to each."""

import math
from collections.abc import Callable
from typing import Any

from transformers.training_args import OptimizerNames

from ..cli import nearest_name

LARS = "lars"
NAMES = [LARS, *(name.value for name in OptimizerNames)]


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError(text)
    return number


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


KINDS: dict[Callable[[str], Any], str] = {_number: "a number of at least 0", _truth: "true or false"}
# What `--optim_args` may say, for the optimizers that the papers use; transformers itself reads those of the others.
ARGUMENTS: dict[str, dict[str, Callable[[str], Any]]] = {
    "sgd": {"momentum": _number, "dampening": _number, "nesterov": _truth},
    LARS: {"momentum": _number, "trust_coefficient": _number, "classic": _truth},
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adafactor": {},
}
DEFAULTS = {"sgd": "momentum=0.9", LARS: "momentum=0.9"}
OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")  # flags
WITHOUT_BETAS = ("sgd", LARS, "adafactor", "adagrad", "rmsprop")  # optimizers that do not read them


def check_name(optim: str) -> None:
    """
    Raises:
        ValueError: there is no such optimizer.
    """
    if optim not in NAMES:
        raise ValueError(f"optim ({optim!r}) is unknown{nearest_name(optim, NAMES)}")


def parse_arguments(optim: str, text: str | None) -> dict[str, Any]:
    """The arguments of an optimizer as `--optim_args` gives them: "momentum=0.9,classic=true".

    Raises:
        ValueError: a part is not name=value, the optimizer has no such argument, or the value is of another kind.
    """
    known, arguments = ARGUMENTS.get(optim), {}
    for part in text.replace(" ", "").split(",") if text else []:
        name, equals, value = part.partition("=")
        if not (name and equals and value) or "=" in value:
            raise ValueError(f"optim_args ({text!r}) must be name=value, with commas between several: correct {part!r}")
        if known is not None and name not in known:
            raise ValueError(f"optim_args ({text!r}): {optim} has no argument {name!r}{_remedy(optim, name)}")
        arguments[name] = value if known is None else _value(name, value, known[name])
    if arguments.get("nesterov") is True and (arguments.get("dampening") or not arguments.get("momentum")):
        raise ValueError(f"optim_args ({text!r}): nesterov needs a momentum above 0 and no dampening")
    return arguments


def _value(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except (ValueError, KeyError) as error:
        raise ValueError(f"optim_args: {name} ({text!r}) must be {KINDS[kind]}") from error


def _remedy(optim: str, name: str) -> str:
    if name == "weight_decay":
        return ": pass --weight_decay"
    if known := list(ARGUMENTS[optim]):
        return nearest_name(name, known)
    return ": leave it out" + (
        "" if optim in WITHOUT_BETAS else ", or pass --adam_beta1, --adam_beta2 or --adam_epsilon"
    )


def optimizer_in_words(optim: str, arguments: str | None) -> str:
    name = optim if optim == LARS else OptimizerNames(optim).value
    return " ".join(filter(None, (name, arguments)))
