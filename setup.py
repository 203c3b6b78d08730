"""Packaging. `pip install -e .` puts `modeling_moco` and `training` on the path; the scripts run from the checkout."""

from pathlib import Path

from setuptools import setup

setup(
    name="moco-hf",
    version="0.1.0",
    description="Momentum Contrast (MoCo v1 and v2) for PyTorch, native to transformers, accelerate, datasets and timm",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=["modeling_moco", "training", "training.benchmarks"],
    package_data={"training": ["recipes/*.yaml"]},
    # Every lower bound, those of "dev" included, is the version that `make test-oldest` installs and runs the tests with.
    # torch and torchvision are resolved together from the same index: a CPU-only torch wheel next to the index's
    # torchvision fails at import with "operator torchvision::nms does not exist".
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17,<6",
        "accelerate>=1.12",
        "datasets>=4.5",
        "timm>=1.0.31",
        "huggingface-hub>=1.33",
        "safetensors>=0.8",
        "filelock>=3.16",
        "scikit-learn>=1.7",
        "threadpoolctl>=3.5",
        "matplotlib>=3.10.7",
        "pyyaml>=6.0",
        "pillow>=11.2.1",
        "opencv-python-headless>=4.10.0.84",
    ],
    extras_require={
        "trackio": ["trackio>=0.40"],
        "onnx": ["onnx>=1.19", "onnxscript>=0.6", "onnxruntime>=1.23"],  # scripts/push_to_hub.py --onnx
        "benchmark": ["lightly>=1.5"],  # a baseline of scripts/benchmark.py data
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML>=6.0.12",
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
