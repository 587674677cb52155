"""What a run leaves for people to look at: figures, the summary on the terminal, the JSON of every number."""

import json
import math
import os
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from Modules.data.manifest import LABELS
from Modules.evaluation import figures
from Modules.evaluation.calibration import correct_prior, uncalibrated
from Modules.evaluation.scoring import both_views
from Modules.evaluation.tables import SHORTCUTS
from Modules.metric_learning.quality import pair_distances

SHOWN = {
    "accuracy": "accuracy",
    "recall": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}


def write_json(file: Path, content: dict) -> None:
    """Write in one step: a reader finds the former file or the new one, never half of it."""
    partial = file.with_suffix(".partial")
    with open(partial, "w") as stream:
        json.dump(_finite(content), stream, indent=2, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _finite(value):
    """NaN and infinity, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: dict, title: str) -> str:
    """The metrics of one set of images with their intervals and the confusion matrix, in 80 columns."""
    lines = [
        title,
        f"  {result['n']} images, {result['n_malignant']} malignant, threshold {result['threshold']:.3f}",
    ]
    for name, label in SHOWN.items():
        lines.append(f"  {label:<18} {_with_interval(result, name)}")
    (tn, fp), (fn, tp) = result["confusion_matrix"]
    lines += [
        f"  {'':<18} {'said benign':>12} {'said malignant':>15}",
        f"  {'benign':<18} {tn:>12} {fp:>15}",
        f"  {'malignant':<18} {fn:>12} {tp:>15}",
    ]
    return "\n".join(lines)


def class_report(result: dict) -> str:
    """Precision, recall, F1 and number of images of each class, in 80 columns."""
    (tn, fp), (fn, tp) = result["confusion_matrix"]
    lines = [f"  {'':<18} {'precision':>10} {'recall':>10} {'F1':>10} {'images':>10}"]
    for label, right, wrong, missed in ((LABELS[0], tn, fn, fp), (LABELS[1], tp, fp, fn)):
        shares = (right, right + wrong), (right, right + missed), (2 * right, 2 * right + wrong + missed)
        cells = (f"{part / whole:.4f}" if whole else "undefined" for part, whole in shares)
        lines.append(f"  {label:<18} " + " ".join(f"{cell:>10}" for cell in cells) + f" {right + missed:>10}")
    return "\n".join(lines)


def calibration_summary(calibration: dict) -> str:
    """What calibration and the correction for the prevalence do to the probabilities of test, in 80 columns."""
    lines = [f"Calibration, {calibration['method']} scaling on validation: error before and after"]
    share = calibration["prevalence"]
    for key, label in (("test", "test set, 50/50"), ("at_prevalence", f"corrected for {share:.3g} malignant")):
        before, after = calibration[key]["before"], calibration[key]["after"]
        lines.append(
            f"  {label:<32} Brier {before['brier']:.4f} to {after['brier']:.4f}, "
            f"ECE {before['ece']:.4f} to {after['ece']:.4f}"
        )
    return "\n".join(lines)


def shortcut_summary(found: dict) -> str:
    """ROC AUC of the whole pictures and of what is left without the lesion, in 80 columns."""
    lines = ["Shortcuts, ROC AUC (0.5: nothing is read but the lesion)"]
    for name, label in SHORTCUTS.items():
        lines.append(f"  {label:<28} {_with_interval(found['views'][name], 'roc_auc')}")
    return "\n".join(lines)


def external_summary(content: dict) -> str:
    """A labelled set that training never saw: what is missing of it, its metrics and how it differs, in 80 columns."""
    lines = [textwrap.fill(f"note: {note}", 80, subsequent_indent="  ") for note in content["notes"]]
    lines += [summary(content["result"], f"External set {content['name']}"[:80]), class_report(content["result"])]
    lines.append(f"  {'':<28} {'here':>12} {'training':>12} {'shift':>9}")
    for row in content["differences"]:
        training = "-" if row["training"] is None else f"{row['training']:.3f}"
        shift = f"{row['shift']:+.1f} sd" if "shift" in row else ""
        lines.append(f"  {row['what']:<28} {row['here']:>12.3f} {training:>12} {shift:>9}".rstrip())
    return "\n".join(lines)


def comparison_summary(result: dict, title: str) -> str:
    """Two models on the same images, in 80 columns."""
    lines = [*textwrap.wrap(title, 80), f"  {result['n']} images, {result['n_malignant']} malignant"]
    lines.append(f"  {'':<18} {'this':>8} {'other':>8}  difference")
    for name, label in SHOWN.items():
        row = result["differences"][name]
        if row["difference"] is None:
            lines.append(f"  {label:<18} undefined: {row['reason']}")
            continue
        bounds = f" [{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}]" if row["ci95"] else " no interval"
        lines.append(f"  {label:<18} {row['first']:>8.4f} {row['second']:>8.4f}  {row['difference']:+.4f}{bounds}")
    delong, mcnemar = result["delong"], result["mcnemar"]
    p = f"p = {delong['p']:.3g}" if delong["p"] is not None else f"undefined: {delong['reason']}"
    lines.append(f"  DeLong, equal ROC AUC: {p}")
    lines.append(f"  McNemar, equal accuracy: p = {mcnemar['p']:.3g}")
    return "\n".join(lines)


def _with_interval(result: dict, name: str) -> str:
    if result[name] is None:
        return f"undefined: {result['undefined'][name]}"
    interval = result[f"{name}_ci95"]
    shown = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
    return f"{result[name]:.4f}   {shown}"


def write_inputs(folder: Path, sample: pd.DataFrame, images: np.ndarray) -> Path:
    """A sheet of augmented training inputs [N, S, S, 3], framed by class."""
    sheet = figures.image_sheet(images, target=sample["target"].to_numpy(), title="Augmented inputs")
    return _save({"inputs": sheet}, folder)[0]


def write_curves(folder: Path, stages: dict[str, tuple[dict[str, list[float]], int]]) -> list[Path]:
    """The learning curves of each stage: name -> history and best epoch, counted from 0."""
    return _save(
        {
            f"curves_{stage}": figures.learning_curves(history, f"Stage {number}: {stage}", best + 1)
            for number, (stage, (history, best)) in enumerate(stages.items(), start=1)
        },
        folder,
    )


def write_test_figures(
    folder: Path, test: pd.DataFrame, probability: np.ndarray, embeddings: np.ndarray, results: dict, margin: float
) -> list[Path]:
    """What `assessment.assess` found, drawn: of the 50/50 set of a test split confusion matrix, ROC and
    precision-recall curve, t-SNE, distances and reliability; of the whole split the last at a prevalence, the curves
    once more where it is another set, and the decision curves."""
    everything, everywhere = test["target"].to_numpy(), probability
    rows = both_views(test)["test"]
    test, probability, embeddings = test[rows], probability[rows], embeddings[rows]
    targets = test["target"].to_numpy()
    pairs = pair_distances(embeddings, targets, test["group"].to_numpy())
    calibration, result = results["calibration"], results["test"]
    corrected = correct_prior(everywhere, calibration["training_prevalence"], results["prevalence"])
    pictures = {
        "confusion_matrix": figures.confusion_matrix(result["confusion_matrix"], "Test set, 50/50"),
        "roc_and_precision_recall": figures.roc_and_precision_recall(targets, probability, result),
        "tsne": figures.tsne(embeddings, targets, "Test embedding", test["patient_id"]),
        "distances": figures.distance_histogram(*pairs, margin=margin),
        "k_shot": figures.k_shot(result["embedding"]["k_shot"], result["roc_auc"]),
        "reliability": figures.reliability(
            targets, uncalibrated(calibration, probability), probability, "Reliability, test set 50/50"
        ),
        "reliability_at_prevalence": figures.reliability(
            everything,
            everywhere,
            corrected,
            f"Reliability at {100 * results['prevalence']:.3g} % malignant",
            results["prevalence"],
            ("as at 50/50", "corrected for the prevalence"),
        ),
        "decision_curves": figures.decision_curves(
            {"whole test split": results["decision_curves"]["own"], "stated": results["decision_curves"]["stated"]}
        ),
    }
    if len(everything) > len(targets):
        pictures["roc_and_precision_recall_full"] = figures.roc_and_precision_recall(
            everything, everywhere, results["test_full"], "Ranking of the whole test split"
        )
    return _save(pictures, folder)


def _save(pictures: dict, folder: Path) -> list[Path]:
    for name, figure in pictures.items():
        figures.save(figure, folder / "figures" / f"{name}.png")
    return [folder / "figures" / f"{name}.png" for name in pictures]
