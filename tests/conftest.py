"""Shared pieces of the tests."""

import gc
import os
import sys

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
gc.disable()  # until all tests are collected: see below


def pytest_collection_finish(session):
    """Modules and thousands of tests stay to the end: no garbage collection goes over them from now on."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    """The server from which processes are forked loads what they need during the first tests."""
    if "forked" in sys.modules:
        sys.modules["forked"].begin(tmp_path_factory.getbasetemp() / "forked.log")


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
