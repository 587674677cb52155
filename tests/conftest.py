"""What the tests of several modules share."""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
from pathlib import Path

import pytest
import tensorflow as tf

from generate_balanced_dataset import generate
from Modules.data.synthetic import write_dataset
from tests.commands import run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that two processes end together."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


@pytest.fixture(autouse=True)
def float32():
    """What a test, or a run that it sees fail, makes of Keras's precision ends with it."""
    yield
    tf.keras.mixed_precision.set_global_policy("float32")


@pytest.fixture(scope="session")
def balanced(tmp_path_factory) -> Path:
    """A small data set with two folds, made by the real commands' functions. Its pictures are 64 pixels a side."""
    folder = tmp_path_factory.mktemp("data")
    generate(write_dataset(folder / "source", images=80, size=64, seed=2), folder / "balanced", size=64, folds=2)
    return folder / "balanced"


@pytest.fixture(scope="session")
def trained(balanced, tmp_path_factory) -> Path:
    """The checkpoints of a small model trained through the real command, and beside them its offline W&B run."""
    home = tmp_path_factory.mktemp("trained")
    run(
        "train.py", "--data", balanced, "--checkpoints", home / "checkpoints", "--backbone", "mobilenet",
        "--image-size", "32", "--batch-size", "16", "--epochs", "2", "--classifier-epochs", "3", "--weights", "none",
        "--wandb", "offline", cwd=home,
    )  # fmt: skip
    return home / "checkpoints"
