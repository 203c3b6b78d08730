"""Packaging.

An installation has `modeling_moco`, and the folder `training` under the name `moco_hf`: `training` would be anybody's name in
site-packages. `pip install -e .` makes both names work, since the scripts and the tests of a checkout say `training`.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "modeling_moco" / "__init__.py").read_text(encoding="utf-8"))[1]
checkout = find_packages(include=["training", "training.*"])
installed = [name.replace("training", "moco_hf", 1) for name in checkout]


class BuildWithCard(build_py):
    """Put the template of the model card, which lies at the top of the checkout, where publishing looks for it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copyfile(ROOT / "model_card.md", Path(self.build_lib, "moco_hf", "hub", "model_card.md"))


setup(
    name="moco-hf",
    version=VERSION,
    description="Momentum Contrast (MoCo v1 and v2) for PyTorch, native to transformers, accelerate, datasets and timm",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls={"MoCo v1": "https://arxiv.org/abs/1911.05722", "MoCo v2": "https://arxiv.org/abs/2003.04297"},
    python_requires=">=3.11",
    packages=["modeling_moco", *installed, *(checkout if "editable_wheel" in sys.argv else [])],
    package_dir={"moco_hf": "training"},
    package_data={
        "modeling_moco": ["py.typed"],
        "moco_hf": [
            "recipes/*.yaml",
            "recipes/detection/*.yaml",
            "recipes/segmentation/*.yaml",
            "tables/*.yaml",
            "py.typed",
        ],
    },
    cmdclass={"build_py": BuildWithCard},
    entry_points={"console_scripts": ["moco = moco_hf.commands:main"]},
    # Every lower bound, those of "dev" included, is the version that `make test-oldest` installs and runs the tests with.
    # torch and torchvision are resolved together from the same index: a CPU-only torch wheel next to the index's
    # torchvision fails at import with "operator torchvision::nms does not exist".
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.18,<6",
        "accelerate>=1.12",
        "datasets>=5.2",
        "timm>=1.0.31",
        "huggingface-hub>=2.2",
        "safetensors>=0.8",
        "filelock>=3.16",
        "scikit-learn>=1.8",
        "threadpoolctl>=3.5",
        "matplotlib>=3.10.7",
        "pyyaml>=6.0",
        "pillow>=12",
        "opencv-python-headless>=4.10.0.84",
    ],
    extras_require={
        "trackio": ["trackio>=0.40"],
        "onnx": ["onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.23"],  # scripts/push_to_hub.py --onnx
        "detect": ["faster-coco-eval>=1.8"],  # COCO's metric of detectors, and masks that are polygons
        "benchmark": ["lightly>=1.5"],  # a baseline of scripts/benchmark.py data
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "uv>=0.9",  # makes requirements.lock
            "setuptools>=77",  # as in pyproject.toml: the lock file has what builds the project too
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML>=6.0.12",
            "markdown-it-py>=3",
            "faster-coco-eval>=1.8",
            "trackio>=0.40",
            "tensorboard>=2.20",
            "onnx>=1.19",
            "onnxscript>=0.6",
            "onnxruntime>=1.23",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
