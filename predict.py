"""Evaluate the classifier on its test split, score pictures, or serve a page to drop them on.

    python predict.py                        the test split that the checkpoint was trained beside, once more
    python predict.py lesion.jpg folder/     pictures, folders of them, patterns, lists (.txt, .csv) -> predictions.csv
    python predict.py folder/ --output predictions.jsonl --explain sheets/      JSON lines; a sheet for each picture
    python predict.py --data clinic          any labelled set: class folders, or a table with paths or ids
    python predict.py --compare other.keras  two models on the same images
    python predict.py --serve                a page on http://127.0.0.1:7860
    python predict.py --export tflite        best_epoch.tflite beside the checkpoint; or onnx; saved_model: a folder

Evaluations are added to the report beside the checkpoint. Every picture gets its probability of melanoma, as in the
50/50 training batches and as at --prevalence, the decision at the checkpoint's threshold, the most similar known
lesions, and whether the model knows such pictures at all; if not, it gets no probability. This is no medical device:
it can miss a melanoma.
"""

from Modules import quiet  # noqa: F401, before TensorFlow

# isort: split
import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import modules
from Modules import cli, runtime, safe_model
from Modules.cli import UserError
from Modules.data.hashing import VIEWS
from Modules.data.images import ImageError, decode, resize
from Modules.data.manifest import LABELS
from Modules.evaluation import evidence, gallery
from Modules.evaluation.calibration import TRAINING_PREVALENCE, prior_offset
from Modules.inputs import count_pictures, find_pictures, read_batches
from Modules.predictions import FORMATS, row, written

SHOWN = 20  # rows on the terminal; the file has them all


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="predict.py", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="pictures, folders, patterns and lists")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/best_epoch.keras"))
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="or .jsonl (predictions.csv)")
    parser.add_argument("--explain", type=Path, metavar="DIR", help="write a sheet for each picture, with heat map")
    parser.add_argument("--neighbours", type=int, default=5, metavar="K", help="known lesions to name (5)")
    parser.add_argument("--tta", type=int, default=1, metavar="N", help="average N flips and turns, 1 to 8 (1)")
    parser.add_argument("--data", type=Path, help="the data set, where it has moved, or any labelled folder or table")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="another checkpoint to compare with")
    parser.add_argument("--prevalence", type=float, help="share malignant in practice (as in training, 0.0176)")
    parser.add_argument("--report-images", choices=("yes", "no"), help="show pictures of the data (as in training)")
    parser.add_argument("--trust", action="store_true", help="use files other than training wrote, at your own risk")
    parser.add_argument("--serve", action="store_true", help="a page in the browser instead of a table")
    parser.add_argument("--precision", default="float32", choices=("float32", "auto"), help="auto: the fastest here")
    parser.add_argument(
        "--export", choices=("tflite", "onnx", "saved_model"), help="write the model for programs without Keras"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address that the page listens on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    options = parser.parse_args(arguments)
    if options.neighbours < 1:
        raise UserError(f"--neighbours {options.neighbours}: expected 1 or more")
    if not 1 <= options.tta <= VIEWS:
        raise UserError(f"--tta {options.tta}: expected 1 to {VIEWS} flips and turns")
    if options.serve and options.paths:
        raise UserError("--serve takes no PATH: pictures are dropped on its page")
    if options.export and (options.paths or options.serve or options.data or options.compare):
        raise UserError("--export writes the model: give no PATH, --serve, --data or --compare with it")
    if options.precision != "float32" and not (options.paths or options.serve):
        raise UserError("--precision is for PATHs and --serve: evaluations are measured in float32")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port}: expected 0 to {2**16 - 1}")
    if options.prevalence is not None:
        prior_offset(TRAINING_PREVALENCE, options.prevalence)
    if (options.paths or options.serve) and (options.data or options.compare):
        raise UserError("--data and --compare evaluate labelled sets: give no other PATH")
    return options


def load(checkpoint: Path, trust: bool) -> evidence.Loaded:
    """A checkpoint: its model, the facts beside it, and its gallery. `trust`: also where the facts are of other files.

    Raises:
        UserError: one of the three is missing, or of another model.
    """
    facts = evidence.load_facts(checkpoint)
    if not trust:
        safe_model.check_hashes(checkpoint, facts)
    known = gallery.read(checkpoint.with_name("gallery.npz"), checkpoint)
    model = modules.load(checkpoint)
    evidence.check_gallery(model, known)
    return model, facts, known


def score_files(options: argparse.Namespace, checkpoint: evidence.Checkpoint, count: int) -> Iterator[dict]:
    """One row for every file, and its sheet where they are asked for; memory does not grow with their number."""
    batches = read_batches(find_pictures(options.paths), checkpoint.size)
    # Of 8 views two batches took 4.1 GB instead of 2.4 (InceptionV3, bfloat16), and no less time.
    at_once = evidence.AT_ONCE if options.tta == 1 else 1
    judged = evidence.judge_batches(checkpoint, batches, options.neighbours, options.tta, at_once)
    with tqdm(total=count, desc="score", unit="image", leave=False, ncols=80, disable=None) as bar:
        for number, (file, picture, found) in enumerate(chain.from_iterable(judged), 1):
            if options.explain and not isinstance(found, ImageError):
                from Modules.evaluation import explanation, figures

                heats = explanation.explain(checkpoint, picture, found)
                sheet = explanation.sheet(file.name, picture, found, heats, checkpoint)
                figures.save(sheet, options.explain / f"{number:0{len(str(count))}}-{file.stem}.png")
            bar.update()
            yield row(file, found, checkpoint.threshold)


def predict(options: argparse.Namespace, checkpoint: evidence.Checkpoint, total: int) -> None:
    """Write the table of all pictures and show its first rows."""
    count = read = malignant = unfamiliar = 0
    with written(score_files(options, checkpoint, total), options.output) as rows:
        for values in rows:
            count, read = count + 1, read + (values["error"] is None)
            malignant += values["prediction"] == LABELS[1]
            unfamiliar += values["in_distribution"] is False
            if count <= SHOWN:
                print_row(values)
    if count > SHOWN:
        print(f"... and {count - SHOWN} more")
    print(f"{read} of {count} pictures scored, {malignant} called malignant; see {options.output}")
    if unfamiliar:
        print(f"{unfamiliar} are unlike anything the model knows and got no probability.")
    if not read:
        raise UserError(f"none of {count} pictures could be read; {options.output} says why")


def print_row(values: dict) -> None:
    """One line of at most 80 columns; a long path keeps its end, a long error its beginning."""
    path = values["path"].encode(errors="replace").decode()
    name = path if len(path) <= 45 else "..." + path[-42:]
    probability = "" if values["probability"] is None else f"{values['probability']:.4f}  "
    print(f"{name:<45}  {values['error'] or probability + values['prediction']}"[:80])


def policy(options: argparse.Namespace) -> str:
    """What the backbone computes in, as Keras names it."""
    if options.precision == "float32":
        return "float32"
    name = runtime.fastest_precision()
    print(f"Scoring in {name}.")
    return runtime.PRECISIONS[name]


def export_model(options: argparse.Namespace, model: tf.keras.Model, known: dict[str, np.ndarray]) -> None:
    """Write the model beside the checkpoint in the form that `--export` names."""
    from Modules.export import PICTURES, export

    rng, size = np.random.default_rng(0), model.input_shape[1]
    shown = [data for place in range(min(PICTURES, len(known["ids"]))) if (data := gallery.thumbnail(known, place))]
    pictures = [resize(decode(data), size) for data in shown] or rng.integers(0, 256, (PICTURES, size, size, 3))
    suffix = "_saved_model" if options.export == "saved_model" else f".{options.export}"
    file = options.checkpoint.with_name(options.checkpoint.stem + suffix)
    difference = export(model, options.export, file, np.stack(pictures).astype(np.uint8))
    print(f"Wrote {file}; on {len(pictures)} pictures it differs by at most {difference:.1g}.")


def main() -> None:
    options = parse()
    count = count_pictures(options.paths) if options.paths else 0
    if options.output.is_dir():
        raise UserError(f"--output {options.output} is a folder: expected a file")
    if options.output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {options.output}: expected a name that ends in {', '.join(FORMATS)}")
    if options.explain and options.explain.exists() and not options.explain.is_dir():
        raise UserError(f"--explain {options.explain} is a file: expected a folder")
    model, facts, known = loaded = load(options.checkpoint, options.trust)
    if options.prevalence is not None and (count or options.serve):
        facts["prevalence"] = options.prevalence
    if options.export:
        export_model(options, model, known)
    elif options.serve:
        from Modules import web  # Gradio takes seconds to load

        web.serve(evidence.open_checkpoint(*loaded, policy(options)), options.neighbours, options.host, options.port)
    elif count:
        runtime.keep_freed_memory()
        predict(options, evidence.open_checkpoint(*loaded, policy(options)), count)
    else:
        from Modules.evaluation import evaluations

        evaluations.run(options, loaded, load(options.compare, options.trust) if options.compare else None)


if __name__ == "__main__":
    cli.run(main)
