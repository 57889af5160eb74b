"""Shared pieces of the tests."""

import os
import pathlib

# One thread a process: the suite runs in parallel processes, and more threads than cores spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The server that forks the ranks keeps the variables of the moment at which the first test of any kind started it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import pytest
import torch

torch.set_num_threads(1)

LONGEST = (
    "mesh/test_mesh_faults",
    "test_torchrun",
    "test_cli",
    "test_plan",
    "mesh/test_mesh_changes",
    "mesh/test_mesh_agent",
    "robustness/test_signals",
    "test_trainer",
    "test_examples",
    "robustness/test_launch",
    "test_baseline",
    "test_readme",
    "mesh/test_mesh_federation",
    "test_trainer_federation",
    "test_report",
    "test_algorithms",
)
"""Files that take half a minute and more, the longest first: a process that begins one last keeps all waiting."""


def pytest_collection_modifyitems(items):
    """Files in the order of `LONGEST`, then all others; `--no-loadscope-reorder` keeps it."""
    here = pathlib.Path(__file__).parent
    place = {here / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def digits_task():
    """The demo task, loaded once; runs attach and detach."""
    from decaf_lora import tasks

    return tasks.digits()


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """What `datasets` caches goes to a folder of the module's own."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
