"""What is said about a picture, and why it should be believed or not: probability, decision, the most similar known
lesions, and whether the model knows such pictures at all.

train.py prepares it (`write_gallery`); predict.py and the page both come to `judge`, so that they say the same.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from Modules.cli import UserError
from Modules.config import Data
from Modules.data.hashing import view
from Modules.data.images import ImageError
from Modules.data.manifest import LABELS
from Modules.evaluation import familiarity, gallery, scoring
from Modules.evaluation.calibration import TRAINING_PREVALENCE, correct_prior
from Modules.evaluation.metrics import PREVALENCE
from Modules.inference import optimised
from Modules.inputs import in_order
from Modules.safe_model import absent

UNFAMILIAR = "unlike known lesions"  # in place of a class
NEEDED = ("data", "fold", "manifest_sha256", "prevalence", "sha256", "difference", "report_images")  # of the facts
AT_ONCE = 2  # batches judged side by side, so that the cores have layers to do while one's neighbours are looked up
NOTICE = "This is no medical device. It misses melanomas. Whoever is worried about a lesion should see a doctor."


Loaded = tuple[tf.keras.Model, dict, dict]  # a checkpoint: its model, its facts, its gallery


class Neighbour(NamedTuple):
    """A known lesion."""

    position: int  # in the gallery
    id: str
    label: str
    diagnosis: str  # empty where unknown
    similarity: float  # cosine of the embeddings, -1..1


class Evidence(NamedTuple):
    """What is said about one picture."""

    probability: float | None  # of melanoma where half of the lesions are; None where not in_distribution
    at_prevalence: float | None  # the same where the share of melanomas is `Checkpoint.prevalence`
    prediction: str  # one of LABELS, or UNFAMILIAR
    in_distribution: bool
    distance: float  # see `familiarity.distance`
    neighbours: tuple[Neighbour, ...]  # nearest first, none of them a copy of the picture or of its patient
    malignant_share: float  # of the neighbours


class Checkpoint(NamedTuple):
    """A trained model with what lies beside it, ready to judge pictures."""

    model: tf.keras.Model
    facts: dict  # best_epoch.json
    gallery: dict[str, np.ndarray]
    run: Callable[[np.ndarray], list[tf.Tensor]]  # float32 [B, S, S, 3] -> probability, embedding, texture

    @property
    def size(self) -> int:
        """Pixels a side that the model sees."""
        return self.model.input_shape[1]

    @property
    def threshold(self) -> float:
        return self.facts["threshold"]

    @property
    def prevalence(self) -> float:
        return self.facts.get("prevalence", PREVALENCE)


def load_facts(checkpoint: Path) -> dict:
    """The JSON beside a checkpoint.

    Raises:
        UserError: it or the checkpoint is missing, or not what train.py writes.
    """
    if not checkpoint.exists():
        raise absent(checkpoint)
    file = checkpoint.with_suffix(".json")
    try:
        facts = json.loads(file.read_text())
        Data(**facts["config"]["data"])
        [facts[name] for name in NEEDED]
        prior = (facts.get("calibration") or {}).get("training_prevalence", TRAINING_PREVALENCE)
        for number in (facts["in_distribution"]["limit"], facts["threshold"], facts["prevalence"], prior):
            if not isinstance(number, int | float) or math.isnan(number):
                raise ValueError(f"{number!r} is no number")
        if not (0 < facts["prevalence"] < 1 and 0 < prior < 1):
            raise ValueError("a prevalence lies between 0 and 1")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"can't use {file}, which train.py writes beside the model ({error!r}): train again if it is older"
        ) from None
    return facts


def check_gallery(model: tf.keras.Model, known: dict[str, np.ndarray]) -> None:
    """Raise UserError unless the gallery's embeddings and textures are as long as the model's."""
    _, embedding, texture = (output.shape[-1] for output in with_evidence(model).outputs)
    shapes = [known[name].shape for name in ("centre", "whitening")]
    if known["embeddings"].shape[1] != embedding or shapes != [(texture,), (texture, texture)]:
        raise UserError("gallery.npz does not fit the model beside it: train again")


def open_checkpoint(
    model: tf.keras.Model, facts: dict, known: dict[str, np.ndarray], policy: str = "float32"
) -> Checkpoint:
    """A checkpoint from its parts: the loaded model, `load_facts` and `gallery.read`; it scores in `policy`."""
    return Checkpoint(model, facts, known, scoring.compiled(with_evidence(optimised(model, policy))))


def with_evidence(model: tf.keras.Model) -> tf.keras.Model:
    """A joined model with three outputs: probability [B, 1], embedding [B, D] and texture [B, F]."""
    outputs = [model.output, model.get_layer("embedding").output, familiarity.texture(model)]
    return tf.keras.Model(model.inputs, outputs)


def write_gallery(
    file: Path,
    checkpoint: Path,
    model: tf.keras.Model,
    training: tuple[pd.DataFrame, tf.data.Dataset],
    validation: tuple[pd.DataFrame, tf.data.Dataset],
    thumbnails: bool,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Write the gallery of the model saved as `checkpoint`; it as read back, and the limit of what the model knows.

    training, validation: each table with its pictures in order, as they are.
    """
    ours = with_evidence(optimised(model))
    _, embeddings, textures = scoring.embed(ours, training[1], len(training[0]), "gallery")
    # Validation sets the limit, so it may not shape what is measured, even where it was learned from.
    fitted = familiarity.fit(textures[(training[0]["split"] != "validation").to_numpy()])
    gallery.write(file, checkpoint, training[0], embeddings, fitted, model.input_shape[1], thumbnails)
    known = gallery.read(file, checkpoint)
    textures = scoring.embed(ours, validation[1], len(validation[0]), "validation")[2]
    distances = familiarity.distance(textures, known)
    limit = familiarity.limit(distances)
    return known, {"limit": limit, "refused_of_validation": float(np.mean(distances > limit))}


def judge(checkpoint: Checkpoint, pictures: np.ndarray, k: int, views: int = 1) -> list[Evidence]:
    """The evidence about each of `pictures`, uint8 [B, S, S, 3] RGB, with its `k` most similar known lesions.

    views: flips and turns (1 to 8) of each picture over which probability and embedding are averaged.
    """
    turned = pictures if views == 1 else np.stack([view(picture, i) for i in range(views) for picture in pictures])
    scored = (part.numpy() for part in checkpoint.run(tf.cast(turned, tf.float32)))
    probability, embeddings, textures = (part.reshape(views, len(pictures), -1) for part in scored)
    probability, embeddings = probability.mean(axis=0)[:, 0], embeddings.mean(axis=0)
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    distances = familiarity.distance(textures[0], checkpoint.gallery)

    known, facts = checkpoint.gallery, checkpoint.facts
    excluded = gallery.relatives(np.stack([gallery.picture_hashes(picture) for picture in pictures]), known)
    positions, cosines = gallery.nearest_known(embeddings, known, k, excluded)
    prior = (facts.get("calibration") or {}).get("training_prevalence", TRAINING_PREVALENCE)
    corrected = correct_prior(probability, prior, checkpoint.prevalence)
    found = []
    for i, distance in enumerate(distances):
        familiar = bool(distance <= facts["in_distribution"]["limit"])
        neighbours = tuple(
            Neighbour(
                int(place),
                str(known["ids"][place]),
                LABELS[known["targets"][place]],
                str(known["diagnoses"][place]),
                float(cosine),
            )
            for place, cosine in zip(positions[i], cosines[i], strict=True)
            if np.isfinite(cosine)
        )
        malignant = sum(neighbour.label == LABELS[1] for neighbour in neighbours)
        found.append(
            Evidence(
                float(probability[i]) if familiar else None,
                float(corrected[i]) if familiar else None,
                LABELS[int(probability[i] >= checkpoint.threshold)] if familiar else UNFAMILIAR,
                familiar,
                float(distance),
                neighbours,
                malignant / max(len(neighbours), 1),
            )
        )
    return found


def judge_batches(
    checkpoint: Checkpoint, batches: Iterable[list[tuple]], k: int, views: int = 1, at_once: int = AT_ONCE
) -> Iterator[list[tuple]]:
    """`batches` of (source, picture or ImageError) in order, each with a third entry: the evidence, or that error.

    k, views: see `judge`. at_once: batches side by side, each with its layers' memory.
    """

    def judged(batch: list[tuple]) -> list[tuple]:
        pictures = [picture for _, picture in batch if not isinstance(picture, ImageError)]
        found = iter(judge(checkpoint, np.stack(pictures), k, views) if pictures else ())
        return [(*pair, pair[1] if isinstance(pair[1], ImageError) else next(found)) for pair in batch]

    with ThreadPoolExecutor(at_once) as pool:
        yield from in_order(pool, judged, batches, at_once)


def in_words(evidence: Evidence, checkpoint: Checkpoint) -> str:
    """One or two plain sentences on what the evidence means."""
    if not evidence.in_distribution:
        return (
            "This picture is unlike the dermoscopic pictures of skin lesions that the model learned from, so it gives "
            "no probability. Was it taken through a dermatoscope, in focus, with the lesion in the middle?"
        )
    recall, specificity = (checkpoint.facts["test"][name] for name in ("recall", "specificity"))
    if evidence.prediction == LABELS[1]:
        said = "The model finds this lesion more like the melanomas than like the harmless lesions that it knows."
        if specificity is None:
            return said
        return f"{said} Of 100 harmless lesions in its test it called {100 * (1 - specificity):.0f} malignant, too."
    said = "The model finds this lesion more like the harmless lesions than like the melanomas that it knows."
    return said if recall is None else f"{said} Of 100 melanomas in its test it missed {100 * (1 - recall):.0f}."
