"""What predict.py measures when it gets no pictures: the checkpoint's own test split once more, or another labelled
set, and on either of them also another model. The report is written again with it."""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd

from dataset import image_batches, load_manifest, select
from Modules.cli import UserError
from Modules.config import Data
from Modules.data.manifest import is_data_set, manifest_sha256
from Modules.evaluation import assessment, evidence, external, familiarity, html, report, scoring
from Modules.evaluation.calibration import correct_prior, errors_at
from Modules.evaluation.comparison import compare
from Modules.evaluation.evidence import Loaded
from Modules.evaluation.intervals import patient_codes
from Modules.evaluation.metrics import evaluate
from Modules.evaluation.subgroups import described, subgroups
from Modules.inference import optimised


def run(options: argparse.Namespace, loaded: Loaded, other: Loaded | None) -> None:
    """Evaluate `loaded` on its own test split or on the set that `--data` names, and print, store and report it."""
    folder = options.data or Path(loaded[1]["data"])
    own = options.data is None or is_data_set(folder)
    home, facts = options.checkpoint.parent, loaded[1]
    table, probability = (own_test if own else external_set)(options, loaded, folder, other)
    if other is not None:
        against(options, loaded, other, table, probability, "the test split" if own else folder.name)
    for again in html.later(home, "test", facts):  # the figures are of its prevalence, too
        facts = facts | again
    html.write_report(home, facts, (options.report_images or facts["report_images"]) == "yes")
    print(f"Wrote {html.REPORT} and {html.CARD} beside the checkpoint.")


def own_test(options, loaded: Loaded, folder: Path, other: Loaded | None) -> tuple[pd.DataFrame, np.ndarray]:
    """The checkpoint's own test split and its probabilities. The results take the place of training's in the report."""
    model, facts, gallery = loaded
    manifest = load_manifest(folder, facts["fold"])
    if manifest_sha256(folder) != facts["manifest_sha256"]:
        raise UserError(
            f"{folder} is not the data set this checkpoint was trained beside: its test split may be known. "
            "For another set name the folder or table that it was made from"
        )
    if other is not None and any(other[1][key] != facts[key] for key in ("manifest_sha256", "fold")):
        raise UserError(
            f"{options.compare} was trained on another split, so it may know these test images: compare checkpoints of "
            "one data set and fold, or name a set that neither knows with --data"
        )
    test = select(manifest, "test", full=True)
    prevalence = facts["prevalence"] if options.prevalence is None else options.prevalence
    results, probability, embeddings = assessment.assess(model, test, gallery, facts, prevalence)
    for key in html.SCORER:
        if facts.get(key):
            results[key] = {view: restated(result, prevalence) for view, result in facts[key].items()}
    store(options.checkpoint.parent, "test", "split", facts, results)
    for view, title in (("test", "Test set, 50/50"), ("test_full", "Whole test split")):
        print(report.summary(results[view], title))
        print(report.class_report(results[view]))
    print(report.calibration_summary(results["calibration"]))
    print(report.shortcut_summary(results["shortcuts"]))
    stage = facts["config"]["embedding"]
    margin = stage["final_margin"] or stage["margin"]
    report.write_test_figures(options.checkpoint.parent, test, probability, embeddings, results, margin)
    return test, probability


def restated(result: dict, prevalence: float) -> dict:
    """`result` of `evaluate` with `ppv` and `npv` at another prevalence, then without interval: it needs the images."""
    recall, specificity = result["recall"], result["specificity"]
    if prevalence == result["prevalence"] or recall is None or specificity is None:
        return result | {"prevalence": prevalence}
    values = {}
    for name, right, wrong, share in (
        ("ppv", recall, 1 - specificity, prevalence),
        ("npv", specificity, 1 - recall, 1 - prevalence),
    ):
        called = right * share + wrong * (1 - share)
        values |= {name: right * share / called if called else None, f"{name}_ci95": None}
    return result | values | {"prevalence": prevalence}


def external_set(options, loaded: Loaded, folder: Path, other: Loaded | None) -> tuple[pd.DataFrame, np.ndarray]:
    """The labelled set in `folder` without what training knew, and its probabilities."""
    model, facts, gallery = loaded
    table, notes = external.read_labelled(folder)
    table = external.readable(table, notes)
    for one in (loaded, other):
        if one is not None:
            size = one[0].input_shape[1]
            table = external.without_known(table, _known(one, notes), one[2], size, notes)
    pictures = image_batches(table, Data(**facts["config"]["data"]))
    scores, _, textures = scoring.embed(evidence.with_evidence(optimised(model)), pictures, len(table), "external")
    probability = scores[:, 0]
    familiar = familiarity.distance(textures, gallery) <= facts["in_distribution"]["limit"]
    prevalence = facts["prevalence"] if options.prevalence is None else options.prevalence
    patients = scoring.units(table)
    content = {
        "name": folder.name,
        "notes": notes,
        "result": evaluate(table["target"].to_numpy(), probability, facts["threshold"], patients, prevalence),
        "calibration": _calibration(table, probability, facts),
        "differences": external.differences(table, facts["used"]["reference"], familiar),
        "subgroups": subgroups(table, probability, facts["threshold"], described(table)),
    }
    print(report.external_summary(content))
    store(options.checkpoint.parent, "external", folder.stem, facts, content)
    return table, probability


def against(options, loaded: Loaded, other: Loaded, table: pd.DataFrame, probability: np.ndarray, images: str) -> None:
    """Compare with `other` on the images of `table`: its 50/50 set, if it has one, and all of it."""
    model, facts, _ = other
    theirs, _ = assessment.score_table(optimised(model), table, Data(**facts["config"]["data"]))
    thresholds = loaded[1]["threshold"], facts["threshold"]
    prevalence = loaded[1]["prevalence"] if options.prevalence is None else options.prevalence
    views = scoring.both_views(table)
    if not table["balanced"].any() or table["balanced"].all():
        views.pop("test")
    content = {"name": options.compare.stem, "path": str(options.compare), "images": images, "views": {}}
    for view, rows in views.items():
        codes = patient_codes(scoring.units(table)[rows], int(rows.sum()))
        target = table["target"].to_numpy()[rows]
        content["views"][view] = compare(target, probability[rows], theirs[rows], thresholds, codes, prevalence)
        print(report.comparison_summary(content["views"][view], f"{options.checkpoint} against {options.compare}"))
    name = "-".join(options.compare.resolve().parts[-2:]).removesuffix(".keras")
    store(options.checkpoint.parent, "comparison", name, loaded[1], content)


def store(folder: Path, kind: str, name: str, facts: dict, content: dict) -> None:
    """Keep `content`, of the model that `facts` are of, for the report; the same name replaces what was there."""
    file = folder / html.LATER / f"{kind}-{re.sub('[^a-zA-Z0-9_-]', '_', name)}.json"
    try:
        file.parent.mkdir(exist_ok=True)
        report.write_json(file, content | {"sha256": facts["sha256"]})
    except OSError as error:
        raise UserError(f"can't write into {folder / html.LATER} ({error.strerror})") from None


def _known(loaded: Loaded, notes: list[str]) -> set[str]:
    """The ids that training or validation of a checkpoint knew, as far as they can still be told."""
    _, facts, gallery = loaded
    known = {str(name).split("@")[0] for name in gallery["ids"]}
    try:
        manifest = load_manifest(facts["data"], facts["fold"])
    except UserError:  # no longer there
        notes.append(f"{facts['data']} is not there: only the gallery's images are left out, not all of validation")
        return known
    learned = manifest["split"].isin(("train", "external", "validation"))
    return known | set(manifest.loc[learned, "isic_id"].str.split("@").str[0])


def _calibration(table: pd.DataFrame, probability: np.ndarray, facts: dict) -> dict | None:
    """`before` and `after` the correction for the set's own share of malignant images; None where it has one class."""
    target, codes = table["target"].to_numpy(), patient_codes(scoring.units(table), len(table))
    share = float(target.mean())
    if not 0 < share < 1:
        return None
    after = correct_prior(probability, facts["calibration"]["training_prevalence"], share)
    return {
        "before": errors_at(target, probability, share, codes),
        "after": errors_at(target, after, share, codes),
    }
