"""Evaluate the classifier on its test split, or score pictures.

    python predict.py                        the test split that the checkpoint was trained beside, once more
    python predict.py lesion.jpg folder/     pictures, and folders of them -> a table and predictions.csv
    python predict.py --data clinic          any labelled set: class folders, or a table with paths or ids
    python predict.py --compare other.keras  two models on the same images

Evaluations are added to the report beside the checkpoint. Every picture gets its probability of melanoma, as in the
50/50 training batches and as at --prevalence, the decision at the checkpoint's threshold and the most similar known
lesions. This is no medical device: it can miss a melanoma.
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import argparse
import csv
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import modules
from Modules import cli, safe_model
from Modules.cli import UserError
from Modules.config import Data
from Modules.data.images import EXTENSIONS, ImageError, read_image
from Modules.data.manifest import LABELS
from Modules.evaluation import evaluations, scoring
from Modules.evaluation.calibration import TRAINING_PREVALENCE, correct_prior, prior_offset

AT = "probability_at_prevalence"
COLUMNS = ("path", "probability", "prediction", "threshold", "in_distribution", "neighbours", "error", AT)
BATCH = 32  # images scored at once
SHOWN = 20  # rows on the terminal; the file has them all


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="predict.py", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="pictures, and folders of them")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/best_epoch.keras"))
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="(predictions.csv)")
    parser.add_argument("--neighbours", type=int, default=5, metavar="K", help="known lesions to name (5)")
    parser.add_argument("--data", type=Path, help="the data set, where it has moved, or any labelled folder or table")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="another checkpoint to compare with")
    parser.add_argument("--prevalence", type=float, help="share malignant in practice (as in training, 0.0176)")
    parser.add_argument("--report-images", default="yes", choices=("yes", "no"), help="show pictures of the data")
    parser.add_argument("--trust", action="store_true", help="use files other than training wrote, at your own risk")
    options = parser.parse_args(arguments)
    if options.neighbours < 1:
        raise UserError(f"--neighbours {options.neighbours}: expected 1 or more")
    if options.prevalence is not None:
        prior_offset(TRAINING_PREVALENCE, options.prevalence)
    if options.paths and (options.data or options.compare):
        raise UserError("--data and --compare evaluate labelled sets: give no other PATH")
    return options


def load_facts(checkpoint: Path) -> dict:
    """The JSON beside a checkpoint.

    Raises:
        UserError: it is missing, or not what train.py writes.
    """
    file = checkpoint.with_suffix(".json")
    try:
        facts = json.loads(file.read_text())
        Data(**facts["config"]["data"])
        facts["in_distribution"]["lowest_similarity"], facts["threshold"], facts["data"], facts["fold"]
        facts["manifest_sha256"], facts["calibration"]["training_prevalence"], facts["prevalence"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"can't use {file}, which train.py writes beside the model ({error!r})") from None
    return facts


def load(checkpoint: Path, trust: bool = False) -> evaluations.Loaded:
    """A checkpoint: its model, the facts beside it, and its gallery. `trust`: also where the facts are of other files.

    Raises:
        UserError: one of the three is missing, or of another model.
    """
    facts = load_facts(checkpoint)
    if not trust:
        safe_model.check_hashes(checkpoint, facts)
    gallery = scoring.read_gallery(checkpoint.with_name("gallery.npz"))
    model = modules.load(checkpoint)
    if gallery["embeddings"].shape[1] != model.get_layer("embedding").output_shape[1]:
        raise UserError(f"the gallery beside {checkpoint} is of another model: put its own there")
    return model, facts, gallery


def find_images(paths: list[Path]) -> list[Path]:
    """The files among `paths` as they are, and the pictures (by suffix) in and below the folders, sorted.

    Raises:
        UserError: no picture at all.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        else:
            files.append(path)
    if not files:
        raise UserError(f"no picture in {', '.join(map(str, paths))}: expected {', '.join(EXTENSIONS)}")
    return files


def read_batches(files: list[Path], size: int) -> Iterator[list[tuple[Path, np.ndarray | ImageError]]]:
    """Batches of files with their pictures, uint8 [S, S, 3], or what is wrong with them; read ahead on all cores."""

    def read(file: Path) -> tuple[Path, np.ndarray | ImageError]:
        try:
            return file, read_image(file, size)
        except ImageError as error:
            return file, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = []
        for start in range(0, len(files), BATCH):
            ahead.append([pool.submit(read, file) for file in files[start : start + BATCH]])
            if len(ahead) > 2:
                yield [future.result() for future in ahead.pop(0)]
        for batch in ahead:
            yield [future.result() for future in batch]


def score_files(options: argparse.Namespace, files: list[Path], model, facts: dict, gallery: dict) -> Iterator[dict]:
    """One row of COLUMNS for every file; memory does not grow with their number."""
    run = scoring.compiled(scoring.with_embedding(model))
    prevalence = facts["prevalence"] if options.prevalence is None else options.prevalence
    threshold, lowest = facts["threshold"], facts["in_distribution"]["lowest_similarity"]
    with tqdm(total=len(files), desc="score", unit="image", leave=False, ncols=80, disable=None) as bar:
        for batch in read_batches(files, facts["config"]["data"]["image_size"]):
            bar.update(len(batch))
            images = [picture for _, picture in batch if not isinstance(picture, ImageError)]
            scores = iter(())
            if images:
                probability, embeddings = (part.numpy() for part in run(np.stack(images).astype(np.float32)))
                positions, similarity = scoring.nearest_known(embeddings, gallery, options.neighbours)
                scores = zip(probability[:, 0], positions, similarity, strict=True)
            for file, picture in batch:
                if isinstance(picture, ImageError):
                    yield dict.fromkeys(COLUMNS, "") | {"path": file, "error": str(picture).removeprefix(f"{file}: ")}
                    continue
                value, nearest, cosines = next(scores)
                yield dict.fromkeys(COLUMNS, "") | {
                    "path": file,
                    "probability": f"{value:.6f}",
                    AT: f"{correct_prior(value, facts['calibration']['training_prevalence'], prevalence):.6f}",
                    "prediction": LABELS[int(value >= threshold)],
                    "threshold": threshold,
                    "in_distribution": bool(cosines[0] >= lowest),
                    "neighbours": " ".join(
                        f"{gallery['ids'][i]}:{LABELS[gallery['targets'][i]]}:{cosine:.3f}"
                        for i, cosine in zip(nearest, cosines, strict=True)
                    ),
                }


def write_rows(rows: Iterator[dict], output: Path) -> tuple[int, int, int]:
    """Write `rows` to `output`, which appears when complete, and show the first; counts of all, read, malignant."""
    count = read = malignant = 0
    partial = output.with_name(output.name + ".partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow(row)
                count, read = count + 1, read + (not row["error"])
                malignant += row["prediction"] == LABELS[1]
                if count <= SHOWN:
                    print_row(row)
        partial.replace(output)
    except OSError as error:
        raise UserError(f"can't write {output} ({error.strerror}): choose another file with --output") from None
    finally:
        partial.unlink(missing_ok=True)
    return count, read, malignant


def main() -> None:
    options = parse()
    files = find_images(options.paths) if options.paths else []
    if options.output.is_dir():
        raise UserError(f"--output {options.output} is a folder: expected a file")
    model, facts, gallery = loaded = load(options.checkpoint, options.trust)
    if not files:
        evaluations.run(options, loaded, load(options.compare, options.trust) if options.compare else None)
        return
    count, read, malignant = write_rows(score_files(options, files, model, facts, gallery), options.output)
    if count > SHOWN:
        print(f"... and {count - SHOWN} more")
    print(f"{read} of {count} pictures scored, {malignant} called malignant; see {options.output}")
    if not read:
        raise UserError(f"none of {count} pictures could be read; {options.output} says why")


def print_row(row: dict) -> None:
    """One line of at most 80 columns; a long path keeps its end, a long error its beginning."""
    path = str(row["path"])
    name = path if len(path) <= 45 else "..." + path[-42:]
    verdict = str(row["error"]) or f"{row['probability'][:6]} {row[AT][:6]}  {row['prediction']}"
    print(f"{name:<45}  {verdict}"[:80])


if __name__ == "__main__":
    cli.run(main)
