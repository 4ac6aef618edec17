import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

import common as c
import ppo


@pytest.fixture(scope="session")
def model_args():
    return ppo.parse_args(["--device", "cpu"])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A digits world that trained just long enough to write chains of four sentences."""
    folder = tmp_path_factory.mktemp("cache")
    paths = c.digits_paths(folder, 0, 1.0)
    c.train_digits_clip(Path(paths["clip"]), 0, 1.0, steps=(20, 20))
    c.train_digits_model(Path(paths["model"]), 0, 1.0, steps=100)
    for path in paths.values():
        (Path(path) / "done").touch()
    return folder


@pytest.fixture(scope="session")
def base(cache, model_args):
    return c.load_model(c.digits_paths(cache, 0, 1.0)["model"], model_args)


@pytest.fixture(scope="session")
def records(cache):
    return c.digits_data("digits", "train", 12, cache)
