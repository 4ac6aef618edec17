import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes stand in one another's way
sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate
import ppo

import builders
import pytest
from accelerate import Accelerator


def pytest_configure(config):
    config.option.loadscopereorder = False  # the order below


def pytest_collection_modifyitems(items):
    """The longest file begins and builds the digits world; those that do without it come next, while it does. Of the others, those
    with the longer tests happen to be last by name and go first, so that no process waits at the end."""
    needs = {item.path.name for item in items if "cache" in item.fixturenames}
    items.sort(key=lambda item: item.path.name, reverse=True)
    items.sort(key=lambda item: (item.path.name != "test_scripts.py", item.path.name in needs))


@pytest.fixture(scope="session")
def model_args():
    return ppo.parse_args(["--device", "cpu"])


@pytest.fixture(scope="session")
def alone():
    """The only process."""
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def reader():
    return common.StatementReader()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The digits world, the same for all workers: the first builds it, the others wait."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    with common.lock(folder):
        if not (folder / "done").exists():
            builders.build_digits_world(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def base(cache, model_args):
    return common.load_model(estimate.digits_paths(cache, 0, 1.0)["model"], model_args, "cpu")


@pytest.fixture(scope="session")
def records(cache):
    return common.digits_data("digits", "train", 12, cache)
