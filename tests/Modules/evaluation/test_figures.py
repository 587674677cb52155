import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from PIL import Image

from Modules.evaluation import figures
from Modules.evaluation.calibration import correct_prior
from Modules.evaluation.decision_curve import decision_curve
from Modules.evaluation.metrics import evaluate

RNG = np.random.default_rng(0)
TARGET = np.tile([0, 1], 40)
PROBABILITY = np.clip(0.3 * TARGET + RNG.random(80) * 0.7, 0, 1)
EMBEDDING = RNG.normal(size=(80, 6)) + TARGET[:, None]


CURVES = {
    name: decision_curve(TARGET, PROBABILITY, share, np.arange(80)) for name, share in (("own", 0.5), ("stated", 0.02))
}


def texts(figure):
    found = [figure.get_suptitle(), *(text.get_text() for text in figure.texts)]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += [label.get_text() for label in axes.get_xticklabels() + axes.get_yticklabels()]
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(found)


def history(epochs):
    return {"loss": np.linspace(1, 0.2, epochs), "val_loss": [np.nan] * epochs, "learning_rate": [1e-3] * epochs}


KSHOT = {
    "1": {"mean": 0.612, "low": 0.5, "high": 0.7},
    "5": None,
    "all": {"mean": 0.88, "low": 0.88, "high": 0.88},
}
EVERY = {
    "curves": lambda: figures.learning_curves(history(20), "Stage 1", 3),
    "one epoch": lambda: figures.learning_curves(history(1), "Stage 1", 1),
    "no epoch": lambda: figures.learning_curves({}, "Stage 1"),
    "confusion": lambda: figures.confusion_matrix([[40, 10], [0, 0]], "Test"),
    "ten classes": lambda: figures.confusion_matrix(np.eye(10, dtype=int), "MNIST", list("0123456789")),
    "roc": lambda: figures.roc_and_precision_recall(TARGET, PROBABILITY, evaluate(TARGET, PROBABILITY, resamples=20)),
    "roc, nothing called": lambda: figures.roc_and_precision_recall(
        TARGET, PROBABILITY, evaluate(TARGET, PROBABILITY, threshold=1, resamples=20)
    ),
    "roc, one class": lambda: figures.roc_and_precision_recall(TARGET * 0, PROBABILITY),
    "tsne": lambda: figures.tsne(EMBEDDING, TARGET, "Test", np.arange(80) // 4),
    "sheet": lambda: figures.image_sheet(RNG.random((9, 16, 16, 3)) * 300, list("abcdefghi"), target=TARGET[:9]),
    "grey sheet": lambda: figures.image_sheet(np.zeros((2, 8, 8, 1), np.uint8)),
    "empty sheet": lambda: figures.image_sheet(np.zeros((0, 8, 8, 3))),
    "distances": lambda: figures.distance_histogram(RNG.random(50), 1 + RNG.random(50), 0.4),
    "no distances": lambda: figures.distance_histogram([], []),
    "equal distances": lambda: figures.distance_histogram(np.zeros(5), []),
    "k-shot": lambda: figures.k_shot(KSHOT, 0.91),
    "k-shot, too few": lambda: figures.k_shot({"1": None}),
    "reliability": lambda: figures.reliability(TARGET, PROBABILITY, PROBABILITY**2),
    "reliability at a prevalence": lambda: figures.reliability(
        TARGET, PROBABILITY, correct_prior(PROBABILITY, 0.5, 0.02), prevalence=0.02, labels=("as it is", "corrected")
    ),
    "reliability of one class at a prevalence": lambda: figures.reliability(TARGET * 0, PROBABILITY, prevalence=0.02),
    "decision curves": lambda: figures.decision_curves(CURVES),
    "decision curves, one": lambda: figures.decision_curves(CURVES | {"own": {"undefined": "one class"}}),
    "decision curves, none": lambda: figures.decision_curves({"own": {"undefined": "one class"}}),
    "reliability, constant": lambda: figures.reliability(TARGET * 0, np.zeros(80)),
    "reliability, empty": lambda: figures.reliability(np.array([], int), np.array([])),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_saved_as_a_png_as_wide_as_a_page(tmp_path, name):
    path = tmp_path / "new" / "figure.png"
    figures.save(EVERY[name](), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1280
        assert 250 < image.height < 2600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # something was drawn


def test_no_figure_is_left_with_pyplot():
    EVERY["confusion"]()
    assert not Gcf.get_all_fig_managers()


def test_curves_have_a_panel_a_quantity_with_training_and_validation():
    figure = EVERY["curves"]()
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "learning rate"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    training, validation, best = figure.axes[0].lines
    assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "--")
    assert training.get_xdata()[[0, -1]].tolist() == [1, 20]
    assert best.get_xdata()[0] == 3
    assert "20 epochs" in texts(figure)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"training", "validation", "best epoch"}


def test_curves_leave_the_history_as_it_was():
    loss = np.array([1.0, np.inf])
    figures.learning_curves({"loss": loss}, "Stage 1")
    assert np.isinf(loss[1])


def test_confusion_matrix_shows_counts_and_percentages_of_rows():
    shown = texts(EVERY["confusion"]())
    assert "40\n80%" in shown
    assert "10\n20%" in shown
    assert "0\n-" in shown  # no malignant image: no percentage
    assert "n = 50" in shown
    assert "benign" in shown
    assert "malignant" in shown


def test_curves_of_ranking_name_their_areas_chance_and_threshold():
    result = evaluate(TARGET, PROBABILITY, resamples=20)
    shown = texts(EVERY["roc"]())
    low, high = result["roc_auc_ci95"]
    assert f"ROC AUC {result['roc_auc']:.3f} [{low:.3f}, {high:.3f}]" in shown
    assert f"average precision {result['average_precision']:.3f}" in shown
    assert "prevalence, 0.5" in shown
    assert "threshold 0.5" in shown
    assert "n = 80, 40 malignant" in shown
    assert "undefined" in texts(EVERY["roc, one class"]())


def test_the_k_shot_curve_names_each_mean_and_leaves_out_what_is_undefined():
    said = texts(EVERY["k-shot"]())
    assert {"0.612", "0.880", "the classifier, 0.910"} <= set(said.split("\n"))
    assert "too few lesions" in texts(EVERY["k-shot, too few"]())


def test_tsne_is_deterministic_and_joins_the_images_of_a_patient():
    first, again = EVERY["tsne"](), EVERY["tsne"]()

    def points(figure):
        return np.concatenate(
            [c.get_offsets() for c in figure.axes[0].collections if not isinstance(c, LineCollection)]
        )

    np.testing.assert_array_equal(points(first), points(again))
    assert len(points(first)) == 80
    (lines,) = (c for c in first.axes[0].collections if isinstance(c, LineCollection))
    assert [len(path.vertices) for path in lines.get_paths()] == [4] * 20
    assert {"benign (40)", "malignant (40)", "same patient"} <= set(texts(first).split("\n"))


@pytest.mark.parametrize("n", [4, 5, 7])
def test_tsne_of_a_few_images(n):
    assert f"n = {n}" in texts(figures.tsne(EMBEDDING[:n], TARGET[:n], "Test"))


def test_tsne_of_some_equal_images_and_of_one_dimension():
    for embedding in (np.repeat(EMBEDDING[:5], 4, axis=0), EMBEDDING[:20, :1]):
        assert "n = 20" in texts(figures.tsne(embedding, TARGET[:20], "Test"))


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (EMBEDDING[:3], "at least 4 images, here are 3"),
        (EMBEDDING[:0], "at least 4 images, here are 0"),
        (np.ones((10, 6)), "collapsed"),
        (np.full((10, 6), np.nan), "not finite"),
    ],
)
def test_tsne_says_why_there_is_no_map(embedding, message):
    assert message in texts(figures.tsne(embedding, TARGET[: len(embedding)], "Test"))


def test_tsne_of_ten_classes_gives_each_its_colour():
    figure = figures.tsne(RNG.normal(size=(40, 5)), np.arange(40) % 10, "Digits", class_names=list("0123456789"))
    assert len({to_hex(c.get_facecolor()[0]) for c in figure.axes[0].collections}) == 10
    assert "9 (4)" in texts(figure)


def test_sheet_frames_each_image_in_the_colour_of_its_class():
    figure = EVERY["sheet"]()
    assert len(figure.axes) == 9
    frames = [to_hex(axes.spines["left"].get_edgecolor()).upper() for axes in figure.axes]
    assert frames == [(figures.BENIGN, figures.MALIGNANT)[t] for t in TARGET[:9]]
    assert figure.axes[0].images[0].get_array().dtype == np.uint8
    assert [axes.get_title() for axes in figure.axes] == list("abcdefghi")


def test_distances_show_both_kinds_of_pairs_and_the_margin():
    shown = texts(EVERY["distances"]())
    for words in (
        "same class, mean",
        "different class, mean",
        "margin 0.4",
        "50 positive, 50 negative pairs",
        "Euclidean",
    ):
        assert words in shown


def test_reliability_shows_before_and_after_with_counts():
    figure = EVERY["reliability"]()
    assert len(figure.axes) == 2
    shown = texts(figure)
    for words in ("before calibration", "after calibration", "images", "n = 80, 40 malignant"):
        assert words in shown


def test_reliability_at_a_prevalence_moves_the_shares_in_odds():
    target, probability = np.tile([0, 1, 1, 1], 5), np.full(20, 0.75)
    figure = figures.reliability(target, probability, prevalence=0.02)
    (point,) = (line for line in figure.axes[0].lines if line.get_marker() == "s")
    assert point.get_ydata()[0] == pytest.approx(0.02)  # 75 % of 75 % is the prevalence again
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_decision_curves_draw_the_model_and_both_strategies():
    figure = EVERY["decision curves"]()
    assert len(figure.axes) == 2
    for axes, curve in zip(figure.axes, CURVES.values(), strict=True):
        model, everybody, _ = axes.lines
        np.testing.assert_allclose(model.get_ydata(), curve["model"])
        np.testing.assert_allclose(everybody.get_ydata(), curve["treat_all"])
    for words in ("treat none", "own, 50 % malignant", "stated, 2 % malignant", "n = 80"):
        assert words in texts(figure)
    assert len(EVERY["decision curves, one"]().axes) == 1
