"""What train.py starts from where nothing was prepared: the data set made on the spot, or a drawn demo in its place."""

from pathlib import Path

import numpy as np

import modules
from generate_balanced_dataset import generate
from Modules.data.synthetic import write_dataset

DEMO_SIZE = 128  # pixels
BALANCED, SMALLER, DEMO = Path("datasets/balanced"), Path("datasets/smaller"), Path("datasets/demo")


def find_data(folder: Path | None) -> tuple[Path, bool]:
    """The folder to train on, and whether it is the synthetic demo, which is made where there is no data set."""
    if folder is not None or BALANCED.exists():
        return folder or BALANCED, False
    if SMALLER.exists():
        print(f"No {BALANCED}: making it from {SMALLER}.")
        generate(SMALLER, BALANCED)
        return BALANCED, False
    print(f"Neither {BALANCED} nor {SMALLER} is there:")
    print(f"training on a synthetic demo in {DEMO}. Its pictures are drawn, not")
    print("photographed; its numbers say nothing about lesions.")
    if not (DEMO / "balanced").exists():
        generate(write_dataset(DEMO / "smaller", size=DEMO_SIZE), DEMO / "balanced", size=DEMO_SIZE)
    return DEMO / "balanced", True


def pretrained(backbone: str, weights: str, is_demo: bool) -> list[np.ndarray] | None:
    """The backbone's weights; the demo, and only the demo, goes on without ImageNet's where they can't be had."""
    try:
        return modules.pretrained(backbone, weights)
    except modules.DownloadError:
        if not is_demo:
            raise
        print(f"Warning: ImageNet weights of {backbone} can't be downloaded:")
        print("the demo starts from random ones.")
        return None
