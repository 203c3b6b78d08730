"""The published methods that a configuration may be of, and their papers."""

from typing import Any

from modeling_moco import MoCoConfig
from modeling_moco.dictionary_moco import BUILT_IN

MOCO_V1, MOCO_V2 = "1911.05722", "2003.04297"
# What a dictionary and who encodes its keys make, and where it was published; of a queue the head tells which version.
OTHER_METHODS = {
    ("batch", "momentum"): ("MoCo v3", "2104.02057"),
    ("batch", "shared"): ("the end-to-end dictionary of MoCo v1", MOCO_V1),
    ("batch_both_views", "none"): ("SimCLR", "2002.05709"),
    ("bank", "none"): ("a memory bank", "1805.01978"),
}
CITATIONS = {
    MOCO_V1: """@inproceedings{he2020moco,
  title     = {Momentum Contrast for Unsupervised Visual Representation Learning},
  author    = {He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross},
  booktitle = {CVPR},
  year      = {2020}
}""",
    MOCO_V2: """@article{chen2020mocov2,
  title   = {Improved Baselines with Momentum Contrastive Learning},
  author  = {Chen, Xinlei and Fan, Haoqi and Girshick, Ross and He, Kaiming},
  journal = {arXiv:2003.04297},
  year    = {2020}
}""",
    "2104.02057": """@inproceedings{chen2021mocov3,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {ICCV},
  year      = {2021}
}""",
    "2002.05709": """@inproceedings{chen2020simclr,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {ICML},
  year      = {2020}
}""",
    "1805.01978": """@inproceedings{wu2018instance,
  title     = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author    = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle = {CVPR},
  year      = {2018}
}""",
}


def method_of(settings: dict[str, Any], told: bool = True) -> tuple[str, str]:
    """The method in words, up to the number of its paper in brackets, and that number at arXiv.

    Args:
        settings: of a [`MoCoConfig`], those that have their defaults perhaps left out.
        told: whether they are known to be those of the pretraining. A classifier has no projection head that could tell the
            version.
    """
    if (other := _other(settings)) is not None:
        return f"{other[0]} (", other[1]
    if (dictionary := _dictionary(settings)) not in BUILT_IN:
        return f"contrastive learning with a dictionary of its author's own, {dictionary} (after MoCo, ", MOCO_V1
    if not told:
        return "Momentum Contrast (MoCo, ", MOCO_V1
    v2 = settings.get("projection_head", MoCoConfig.projection_head) == "mlp"
    return f"Momentum Contrast (MoCo {'v2' if v2 else 'v1'}, ", MOCO_V2 if v2 else MOCO_V1


def papers_of(settings: dict[str, Any]) -> list[str]:
    """Numbers at arXiv of what to cite for a model: its method's, or both versions of MoCo."""
    other = _other(settings)
    return [MOCO_V1, MOCO_V2] if other is None else [other[1]]


def _other(settings: dict[str, Any]) -> tuple[str, str] | None:
    return OTHER_METHODS.get((_dictionary(settings), str(settings.get("key_encoder", MoCoConfig.key_encoder))))


def _dictionary(settings: dict[str, Any]) -> str:
    return str(settings.get("dictionary", MoCoConfig.dictionary))
