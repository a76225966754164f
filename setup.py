"""The package: `pip install -e .`, with extras for what not every machine needs."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "rlhf_jax/__init__.py").read_text())[1]

CORE = [
  "absl-py>=2.1",
  "alembic>=1.14,<2",  # migrations of the database of people's records
  "array_record>=0.8,<1",
  "chex>=0.1.91,<0.2",
  "fastapi>=0.115,<1",
  "flax>=0.12,<0.13",
  "gguf>=0.17,<1",
  "grain>=0.2.12,<0.3",
  "importlib_resources>=6.0",  # tensorflow_datasets needs it and does not say so
  "jax>=0.10,<0.12",
  "matplotlib>=3.9,<4",
  "ml_collections>=1.0,<2",
  "numpy>=2.0,<3",
  "optax>=0.2.5,<0.3",
  "orbax-checkpoint>=0.11.30,<0.13",
  "prometheus-client>=0.21,<1",
  "pydantic>=2.10,<3",
  "rich>=13.9",
  "safetensors>=0.5,<1",
  "sqlalchemy>=2.0,<3",  # people's records are as much part of the recipe as the optimiser
  "starlette>=0.46,<2",
  "tensorboardX>=2.6.2,<3",
  "tensorflow-datasets>=4.9.9,<5",  # reads and writes ArrayRecord without TensorFlow
  "tokenizers>=0.21,<1",
  "uvicorn>=0.34,<1",
  # uvicorn's parser and event loop in C, which it takes where it finds them.
  "httptools>=0.6,<1",
  "uvloop>=0.21,<1; sys_platform != 'win32'",
]

EXTRAS = {
  "test": [
    "httpx>=0.28,<1",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "openai>=2.0,<3",  # the client that the server must satisfy
    "playwright>=1.50,<2",  # drives the pages where a Chromium is installed
    "psycopg[binary]>=3.2,<4",  # the database is tested on PostgreSQL where one is installed
    "pytest>=8.3",
    "pytest-xdist>=3.6,<4",  # one process of tests a core
    "ruff>=0.9",
    "schemathesis>=4.0,<5",  # looks for requests that break the server
  ],
  # Independent code that tests compare with; pinned where a test leans on its details.
  "reference": [
    "accelerate>=1.10",
    "rlax==0.1.9",
    "torch==2.13.0",
    "transformers>=5.0,<6",
    "trl==1.12.0",
  ],
  "gpu": ["jax[cuda13]>=0.10,<0.12"],
  "tpu": ["jax[tpu]>=0.10,<0.12"],
  "postgres": ["psycopg[binary]>=3.2,<4"],  # records that several machines write
}

setuptools.setup(
  name="rlhf_jax",
  version=VERSION,
  description="The recipe that made ChatGPT, in JAX: SFT, comparisons, reward model, PPO, rounds.",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
  package_data={
    "rlhf_jax.feedback.migrations": ["script.py.mako"],
    "rlhf_jax.serving": ["static/**"],
  },
  install_requires=CORE,
  extras_require=EXTRAS,
)
