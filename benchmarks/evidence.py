"""Can the evidence be believed? Where the heat map points, and whether pictures that are no skin are recognised.

    .venv/bin/python train.py --data datasets/demo/balanced --recipe tuned --external ignore --image-size 96 --epochs 15
    .venv/bin/python benchmarks/evidence.py                                   the checkpoint of drawn lesions that makes
    .venv/bin/python benchmarks/evidence.py --checkpoint runs/best_epoch.keras --data datasets/balanced
    .venv/bin/python benchmarks/evidence.py --pictures DIR                    with more pictures that are no skin

The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018, section 4.1): of newly
drawn malignant lesions, whose masks are known, that the model calls malignant, the share whose heat map has its maximum
inside the lesion; beside it the same model with random weights on the same pictures, and Grad-CAM of both. It says
something about a model that can tell drawn lesions (the few epochs of `make train` are too short), and with the random
weights beside: the lesions lie in the middle, which a map that says nothing may hit as well.

What is no skin: the photographs and textures that come with scikit-image and scikit-learn, whole and in parts, noise,
plain colours, text and patterns; and the test split of the data set for what must not be refused.

The exit code is 1 if a figure misses its limit.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import cv2
import numpy as np
import skimage.data
import sklearn.datasets.images
import tensorflow as tf
from scipy.stats import binomtest

import modules
from dataset import load_manifest, select
from Modules import cli
from Modules.data.images import EXTENSIONS, ImageError, read_image, resize
from Modules.data.synthetic import draw
from Modules.evaluation import evidence, explanation, gallery, scoring

CHECKPOINT = Path("checkpoints/best_epoch.keras")
DRAWN = 200  # malignant lesions
POINTING, RECOGNISED, REFUSED = 0.85, 0.95, 0.05  # the limits
PARTS = 4  # of each photograph
SIDE = 256
BATCH = 32

Heat = Callable[[np.ndarray], np.ndarray]  # a picture uint8 [S, S, 3] -> its heat map float32 [h, w]


def photographs(folders: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of the world: name, uint8 [H, W, 3]."""
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in EXTENSIONS:
                try:
                    yield file.name, read_image(file)
                except ImageError:
                    continue  # a format that is not ours, in a package that is not ours


def parts(picture: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Square cut-outs, a third to two thirds of the shorter side."""
    for _ in range(PARTS):
        side = int(min(picture.shape[:2]) * rng.uniform(0.35, 0.7))
        y, x = (rng.integers(0, length - side + 1) for length in picture.shape[:2])
        yield np.ascontiguousarray(picture[y : y + side, x : x + side])


def made_up(rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Noise, plain colours, text, patterns."""
    shape = (SIDE, SIDE, 3)
    coloured = rng.integers(0, 256, shape).astype(np.uint8)
    yield "noise", coloured
    yield "grey noise", np.repeat(coloured[..., :1], 3, axis=2)
    yield "normal noise", np.clip(rng.normal(128, 40, shape), 0, 255).astype(np.uint8)
    for blur in (2, 4, 16):
        smooth = cv2.GaussianBlur(rng.normal(size=shape), (0, 0), blur)
        yield f"clouds {blur}", cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    for colour in [(grey,) * 3 for grey in (0, 64, 128, 192, 255)] + [(200, 30, 30), (222, 170, 150), (120, 80, 60)]:
        yield f"plain {colour}", np.full(shape, colour, np.uint8)
    for font in range(5):
        page = np.full(shape, 255, np.uint8)
        for y in range(20, SIDE, 16 + 4 * font):
            cv2.putText(page, "The quick brown fox jumps"[font:], (5, y), font, 0.4 + 0.1 * font, (0, 0, 0), 1)
        yield f"text {font}", page
    y, x = np.indices(shape[:2])
    for name, pattern in {
        "squares": (y // 32 + x // 32) % 2 * 255,
        "stripes": (x + y) // 16 % 2 * 255,
        "ramp": (x + y) / 2,
    }.items():
        yield name, np.repeat(pattern[..., None].astype(np.uint8), 3, axis=2)
    for colour in ((0, 0, 0), (139, 69, 19)):
        yield f"disc {colour}", cv2.circle(np.full(shape, 255, np.uint8), (128, 128), 60, colour, -1)


def no_skin(folders: list[Path], size: int) -> tuple[list[str], np.ndarray]:
    """Names and pictures uint8 [N, S, S, 3]."""
    rng = np.random.default_rng(0)
    named = []
    for name, picture in photographs(folders):
        named += [(name, picture), *((f"part of {name}", part) for part in parts(picture, rng))]
    named += made_up(rng)
    return [name for name, _ in named], np.stack([resize(picture, size) for _, picture in named])


def judged(checkpoint: evidence.Checkpoint, pictures: np.ndarray) -> list[evidence.Evidence]:
    batches = (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))
    return [one for batch in batches for one in evidence.judge(checkpoint, batch, 1)]


def occlusion(model: tf.keras.Model) -> Heat:
    """The product's heat map of the probability."""
    run = scoring.compiled(scoring.with_embedding(model))
    nothing = np.zeros((0, model.get_layer("embedding").output_shape[1]), np.float32)
    return lambda picture: explanation.heat_maps(run, picture, nothing)[0]


def grad_cam(model: tf.keras.Model) -> Heat:
    """The last maps of the backbone, each weighted by the mean gradient of the logit (Selvaraju et al., ICCV 2017)."""
    outputs = [model.get_layer("features").get_input_at(0), model.get_layer("probability").input]
    parts = tf.keras.Model(model.inputs, outputs)

    def heat(picture: np.ndarray) -> np.ndarray:
        images = tf.constant(picture[None], tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(images)
            maps, logits = parts(images, training=False)
        weights = tf.reduce_mean(tape.gradient(logits, maps), axis=(1, 2))
        return tf.nn.relu(tf.einsum("bhwc,bc->bhw", maps, weights))[0].numpy()

    return heat


def hits(heat_map: Heat, pictures: np.ndarray, masks: np.ndarray) -> int:
    """In how many pictures the heat map, laid over it as it is shown, has its maximum in the mask bool [N, S, S]."""
    found = 0
    for picture, mask in zip(pictures, masks, strict=True):
        heat = cv2.resize(heat_map(picture), mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        found += bool(mask[np.unravel_index(heat.argmax(), heat.shape)] and heat.max() > 0)
    return found


def shown(title: str, count: int, n: int, least: float | None = None, most: float | None = None) -> bool:
    """Print a share with its 95 % interval and its limit; whether it keeps it."""
    share, (low, high) = count / n, binomtest(count, n).proportion_ci(method="wilson")
    kept = (least is None or share >= least) and (most is None or share <= most)
    limit = f"at least {least:.0%}" if least else f"at most {most:.0%}" if most else "for comparison"
    print(f"{title:<46} {count:>4} of {n:<4} {share:6.1%} [{low:.1%}, {high:.1%}]  {limit}{'' if kept else '  MISSED'}")
    return kept


def main() -> None:
    parser = cli.Parser(prog="evidence.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--data", type=Path, help="its data set (where training found it)")
    parser.add_argument("--pictures", type=Path, nargs="*", default=[], help="folders of pictures that are no skin")
    parser.add_argument("--peer-python", help="not needed: there is no peer")
    options = parser.parse_args()
    if options.checkpoint == CHECKPOINT and not CHECKPOINT.exists():
        print(f"skipped: no {CHECKPOINT}; make train makes one")
        return
    model, facts = modules.load(options.checkpoint), evidence.load_facts(options.checkpoint)
    known = gallery.read(options.checkpoint.with_name("gallery.npz"), options.checkpoint)
    checkpoint = evidence.open_checkpoint(model, facts, known)

    pictures, masks = zip(
        *(draw(np.random.default_rng((7, i)), True, checkpoint.size) for i in range(DRAWN)), strict=True
    )
    pictures, masks = np.stack(pictures), np.stack(masks)
    called = checkpoint.run(pictures.astype(np.float32))[0].numpy()[:, 0] >= checkpoint.threshold
    kept = bool(called.any())
    if not kept:
        print(f"None of {DRAWN} drawn malignant lesions was called malignant: no pointing game  MISSED")
    else:
        n, pictures, masks = int(called.sum()), pictures[called], masks[called]
        print(f"Drawn malignant lesions: {n} of {DRAWN} called malignant; they cover {masks.mean():.0%} of the area")
        tf.keras.utils.set_random_seed(0)
        untrained = tf.keras.models.clone_model(model)
        kept &= shown("maximum of the heat map inside the lesion", hits(occlusion(model), pictures, masks), n, POINTING)
        shown("  the same with random weights", hits(occlusion(untrained), pictures, masks), n)
        shown("  Grad-CAM instead", hits(grad_cam(model), pictures, masks), n)
        shown("  Grad-CAM with random weights", hits(grad_cam(untrained), pictures, masks), n)

    folders = [Path(package.__file__).parent for package in (skimage.data, sklearn.datasets.images)]
    names, strangers = no_skin(folders + options.pictures, checkpoint.size)
    refused = [not one.in_distribution for one in judged(checkpoint, strangers)]
    kept &= shown("no skin, recognised", sum(refused), len(refused), least=RECOGNISED)
    taken = [name for name, known in zip(names, refused, strict=True) if not known]
    print("  taken for skin:", ", ".join(taken) or "none")
    test = select(load_manifest(options.data or facts["data"], facts["fold"]), "test", full=True)
    lesions = np.stack([read_image(file, checkpoint.size) for file in test["file"]])
    refused = [not one.in_distribution for one in judged(checkpoint, lesions)]
    kept &= shown("lesions of the test split, refused", sum(refused), len(refused), most=REFUSED)
    sys.exit(not kept)


if __name__ == "__main__":
    cli.run(main)
