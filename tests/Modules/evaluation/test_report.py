"""What people read: 80 columns whatever the numbers, and files that are whole or the former ones."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from Modules.evaluation import report
from Modules.evaluation.assessment import decision_curves
from Modules.evaluation.calibration import errors_at
from Modules.evaluation.comparison import compare
from Modules.evaluation.metrics import evaluate

TITLE = "The plain classifier on it (frozen features, logistic regression)"  # the longest there is


def result_of(target, probability, patients=None):
    return evaluate(np.array(target, int), np.array(probability, float), patients=patients, resamples=20)


MIXED = result_of([0, 1] * 5, [0.1, 0.9] * 4 + [0.6, 0.4])
RESULTS = {
    "mixed": MIXED,
    "no images": result_of([], []),
    "one benign": result_of([0], [0.2]),
    "one malignant": result_of([1], [1.0]),
    "only benign": result_of([0] * 9, [0.2] * 9),
    "only malignant, all missed": result_of([1] * 9, [0.1] * 9),
    "all called malignant": result_of([0, 1] * 5, [0.9] * 10),
    "one patient": result_of([0, 1] * 5, [0.1, 0.9] * 5, patients=["a"] * 10),
    "millions": {**MIXED, "n": 10**9, "n_malignant": 10**8, "confusion_matrix": [[10**9, 10**8], [10**8, 10**9]]},
}


# --- The terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_the_terminal_holds_80_columns(name):
    text = report.summary(RESULTS[name], TITLE) + "\n" + report.class_report(RESULTS[name])
    assert max(map(len, text.splitlines())) <= 80
    assert not {"None", "nan"} & set(text.split())


@pytest.mark.parametrize("name", RESULTS)
def test_every_metric_is_shown_with_its_value_or_the_reason_it_has_none(name):
    result = RESULTS[name]
    lines = report.summary(result, TITLE).splitlines()
    for key, label in report.SHOWN.items():
        (line,) = (line for line in lines if line.startswith(f"  {label} "))
        if result[key] is None:
            assert line.endswith(f"undefined: {result['undefined'][key]}")
        else:
            assert f" {result[key]:.4f} " in line


def test_intervals_are_shown_or_said_to_be_missing():
    low, high = MIXED["roc_auc_ci95"]
    assert f"95 % interval {low:.3f} to {high:.3f}" in report.summary(MIXED, TITLE)
    assert RESULTS["one patient"]["roc_auc_ci95"] is None
    assert "no interval" in report.summary(RESULTS["one patient"], TITLE)


def test_the_confusion_matrix_has_truth_in_rows():
    lines = report.summary({**MIXED, "confusion_matrix": [[11, 22], [33, 44]]}, TITLE).splitlines()
    assert lines[-3].split() == ["said", "benign", "said", "malignant"]
    assert [line.split() for line in lines[-2:]] == [["benign", "11", "22"], ["malignant", "33", "44"]]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_class_report_is_that_of_scikit_learn(pairs):
    target, called = np.array(pairs).T
    matrix = [[int(((target == row) & (called == column)).sum()) for column in (0, 1)] for row in (0, 1)]
    expected = classification_report(target, called, labels=[0, 1], output_dict=True, zero_division=np.nan)
    header, *lines = report.class_report({"confusion_matrix": matrix}).splitlines()
    assert header.split() == ["precision", "recall", "F1", "images"]
    for line, label, key in zip(lines, ("benign", "malignant"), "01", strict=True):
        name, *numbers = line.split()
        values = expected[key]
        assert name == label
        shown = [values["precision"], values["recall"], values["f1-score"], values["support"]]
        assert [number == "undefined" for number in numbers] == np.isnan(shown).tolist()
        pairs = [(float(number), value) for number, value in zip(numbers, shown, strict=True) if number != "undefined"]
        assert [number for number, _ in pairs] == pytest.approx([value for _, value in pairs], abs=5.1e-5)


TARGET = np.arange(60) % 2
ONE, OTHER = (np.random.default_rng(seed).random(60) for seed in (0, 1))


def test_a_comparison_holds_80_columns_and_every_shown_metric():
    result = compare(TARGET, ONE, OTHER, (0.5, 0.4), np.arange(60))
    said = report.comparison_summary(result, "checkpoints/" + "deep/" * 30 + "best_epoch.keras against other.keras")
    assert max(map(len, said.splitlines())) <= 80
    assert f"p = {result['delong']['p']:.3g}" in said
    assert f"{result['differences']['roc_auc']['difference']:+.4f}" in said
    one_class = report.comparison_summary(compare(TARGET * 0, ONE, OTHER, (0.5, 0.5), np.arange(60)), "a against b")
    assert "undefined: no malignant image" in one_class
    assert "DeLong, equal ROC AUC: undefined" in one_class


def test_an_external_set_holds_80_columns_with_its_notes():
    content = {
        "name": "n" * 100,
        "notes": ["no table by " + ", ".join(["anatom_site_general_challenge"] * 5)],
        "result": RESULTS["only benign"],
        "differences": [
            {"what": "share malignant", "here": 0.0, "training": 0.5},
            {"what": "lightness L*", "here": 61.0, "training": 64.4, "shift": -0.4},
            {"what": "share of a familiar kind", "here": 1.0, "training": None},
        ],
    }
    said = report.external_summary(content)
    assert max(map(len, said.splitlines())) <= 80
    assert "-0.4 sd" in said
    assert "undefined: no malignant image" in said


def test_calibration_and_shortcuts_hold_80_columns():
    sides = {"before": errors_at(TARGET, ONE, 0.5, np.arange(60)), "after": errors_at(TARGET, OTHER, 0.5, TARGET)}
    calibration = {"method": "temperature", "prevalence": 0.0176, "test": sides, "at_prevalence": sides}
    view = {"roc_auc": None, "roc_auc_ci95": None, "undefined": {"roc_auc": "no malignant image"}}
    said = report.calibration_summary(calibration) + "\n"
    said += report.shortcut_summary({"views": dict.fromkeys(("whole", "lesion_covered", "rim_alone"), view)})
    assert max(map(len, said.splitlines())) <= 80
    assert f"{sides['before']['ece']:.4f} to {sides['after']['ece']:.4f}" in said
    assert said.count("undefined: no malignant image") == 3


# --- Files ------------------------------------------------------------------------------------------------------------


def refuse(name):
    raise ValueError(f"{name} is not JSON")


def test_json_holds_what_was_written_and_no_nan(tmp_path):
    content = {"n": 3, "name": "größer", "history": {"val_loss": [0.5, np.nan, np.inf]}, "nested": [{"x": (1, np.nan)}]}
    report.write_json(tmp_path / "best_epoch.json", content)
    text = (tmp_path / "best_epoch.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "n": 3,
        "name": "größer",
        "history": {"val_loss": [0.5, None, None]},
        "nested": [{"x": [1, None]}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["best_epoch.json"]


def test_a_failed_write_leaves_the_former_file(tmp_path):
    file = tmp_path / "best_epoch.json"
    report.write_json(file, {"accuracy": 0.9})
    with pytest.raises(TypeError):
        report.write_json(file, {"accuracy": 0.8, "model": object()})
    assert json.loads(file.read_text()) == {"accuracy": 0.9}


@pytest.fixture
def scored_split():
    """A test split of which two thirds are its 50/50 set, and what a model said of it."""
    rng = np.random.default_rng(0)
    target = np.array([0, 1, 0] * 8)
    table = pd.DataFrame(
        {
            "target": target,
            "balanced": np.arange(24) % 3 < 2,
            "group": [f"group {i}" for i in range(24)],
            "patient_id": [f"patient {i}" for i in range(24)],
        }
    )
    vectors = rng.normal(size=(24, 4)) + target[:, None]
    return table, rng.uniform(size=24), (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def results_of(table, probability):
    """The part of what `assess` finds that figures show."""
    target, calibration = table["target"].to_numpy(), {"scale": 1.0, "offset": 0.0, "training_prevalence": 0.5}
    rows = table["balanced"].to_numpy()
    return {
        "prevalence": 0.02,
        "test": evaluate(target[rows], probability[rows], resamples=20) | {"embedding": {"k_shot": {"1": None}}},
        "test_full": evaluate(target, probability, resamples=20),
        "calibration": calibration,
        "decision_curves": decision_curves(table, probability, 0.02),
    }


def test_every_figure_is_written_where_it_is_said_to_be(tmp_path, scored_split):
    table, probability, embeddings = scored_split
    history = {"loss": [0.5, 0.4], "val_loss": [0.6, np.nan]}
    written = [
        report.write_inputs(tmp_path, table[:6], np.zeros((6, 8, 8, 3), np.float32)),
        *report.write_curves(tmp_path, {"embedding": (history, 0), "classifier": (history, 1)}),
        *report.write_test_figures(
            tmp_path, table, probability, embeddings, results_of(table, probability), margin=0.4
        ),
    ]
    assert [path.name for path in written] == [
        "inputs.png", "curves_embedding.png", "curves_classifier.png",
        "confusion_matrix.png", "roc_and_precision_recall.png", "tsne.png", "distances.png", "k_shot.png",
        "reliability.png", "reliability_at_prevalence.png", "decision_curves.png", "roc_and_precision_recall_full.png",
    ]  # fmt: skip
    for path in written:
        assert path.parent == tmp_path / "figures"
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_test_figures_show_the_balanced_images_alone(tmp_path, scored_split, monkeypatch):
    table, probability, embeddings = scored_split
    seen = {}
    monkeypatch.setattr(report.figures, "save", lambda figure, path: seen.setdefault(path.stem, figure))
    for name in ("roc_and_precision_recall", "reliability"):
        monkeypatch.setattr(report.figures, name, lambda *shown: shown)
    monkeypatch.setattr(report.figures, "tsne", lambda *shown: shown)
    report.write_test_figures(tmp_path, table, probability, embeddings, results_of(table, probability), margin=0.4)
    rows = table["balanced"].to_numpy()
    np.testing.assert_array_equal(seen["roc_and_precision_recall"][0], [0, 1] * 8)
    np.testing.assert_array_equal(seen["roc_and_precision_recall"][1], probability[rows])
    np.testing.assert_array_equal(seen["tsne"][0], embeddings[rows])
    np.testing.assert_allclose(seen["reliability"][1], probability[rows], atol=1e-12)
    np.testing.assert_array_equal(seen["reliability_at_prevalence"][1], probability)
    np.testing.assert_array_equal(seen["roc_and_precision_recall_full"][1], probability)
    assert list(seen["tsne"][3]) == list(table["patient_id"][rows])
