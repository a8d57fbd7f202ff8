"""Packaging of Temper; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="temper-mcore",
    version="0.1.0",
    description="Tune HuggingFace checkpoints with Megatron-core and get HuggingFace checkpoints back",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["toolkits*", "conversion*", "data_preprocessing*"]),
    package_data={"toolkits.quickstart": ["*.jsonl", "identity/*"]},
    entry_points={"console_scripts": ["temper = toolkits.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.17",
        "transformers>=4.45",
        "sentencepiece",
        "numpy",
        "safetensors",
        "tokenizers",
        "fastokens",  # the faster encoder, used where it proves equal to tokenizers
        "jinja2",
        "click",
        "rich",
        "orjson",
        "pyyaml",  # recipes of filters, pipelines
        "psutil",  # megatron-core's checkpoint writer hangs without it
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "data": ["pyarrow"],  # Parquet and zstd
        "qlora": ["bitsandbytes>=0.50"],  # NF4, on a GPU and on a CPU
        "te": ["transformer-engine[pytorch]"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny<4"],  # enough for its file store
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "pyarrow", "peft", "bitsandbytes>=0.50", "trl>=1.16,<2"],
    },
)
