"""Figures of training and evaluation. Each function returns a `matplotlib.figure.Figure`; `save` writes it.

Figures are objects of their own, never pyplot's: nothing global, so nothing leaks and any thread may draw. One look
everywhere: benign blue, malignant vermilion (Okabe & Ito's colour-blind safe palette), training solid, validation
dashed. Eight inches at 160 dots an inch fill a page of 1280 pixels; 12-point text stays readable at 390 too.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import binomtest
from sklearn.manifold import TSNE
from sklearn.metrics import precision_recall_curve, roc_curve
from threadpoolctl import threadpool_limits

from Modules.evaluation.calibration import correct_prior
from Modules.evaluation.intervals import patient_codes
from Modules.evaluation.metrics import calibration_bins

CLASSES = {"benign": "#0072B2", "malignant": "#D55E00"}
BENIGN, MALIGNANT = CLASSES.values()
GREEN, PURPLE, INK, GREY = "#009E73", "#CC79A7", "#222222", "#8A8A8A"
FLOOR = 1e-4  # the lowest probability on a logarithmic axis
WIDTH, DPI, TEXT, SMALL = 8, 160, 12, 10.5  # inches, dots an inch, points, points


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG 1280 pixels wide, and the folder it needs."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")


def learning_curves(history: dict[str, Sequence[float]], title: str, best_epoch: int | None = None) -> Figure:
    """One panel for each quantity of a Keras history (`name` with `val_name`); values that are not finite leave a gap.

    best_epoch: counted from 1, as the axis is.
    """
    names = list(dict.fromkeys(name.removeprefix("val_") for name in history))
    epochs = max((len(values) for values in history.values()), default=0)
    if not epochs:
        return _note(title, "no epoch was recorded")
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(f"{title} ({epochs} epoch{'s' * (epochs > 1)})", 1.2 + 2.5 * rows)
    for index, name in enumerate(names):
        axes = _axes(figure, "epoch", name.replace("f1", "F1").replace("_", " "), (rows, columns, index + 1))
        for key, label, style, colour in [(name, "training", "-", INK), (f"val_{name}", "validation", "--", GREEN)]:
            values = np.array(history.get(key, []), dtype=float)
            values[~np.isfinite(values)] = np.nan
            if len(values):
                marker = "o" if epochs <= 30 else None
                axes.plot(1 + np.arange(len(values)), values, style, c=colour, label=label, marker=marker, ms=3, lw=1.8)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=PURPLE, lw=1.8, ls=":", label="best epoch")
        axes.set_xlim(0.5, epochs + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if name in ("learning_rate", "lr"):
            axes.set_yscale("log")
    _shared_legend(figure)
    return figure


def confusion_matrix(
    matrix: Sequence[Sequence[int]], title: str, class_names: Sequence[str] = tuple(CLASSES)
) -> Figure:
    """Counts [K, K], rows the true class, columns the predicted one, with the percentage of each row."""
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = _figure(f"{title} (n = {matrix.sum()})", 6.5)
    axes = _axes(figure, "predicted class", "true class")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        style = {"fontsize": 20 if len(matrix) <= 4 else 8.5, "color": "white" if share[row, column] > 0.5 else INK}
        percent = f"{share[row, column]:.0%}" if matrix[row].any() else "-"
        axes.text(column, row, f"{count}\n{percent}", ha="center", va="center", **style)
    axes.set_xticks(range(len(matrix)), class_names)
    axes.set_yticks(range(len(matrix)), class_names)
    axes.grid(False)
    return figure


def roc_and_precision_recall(
    target: np.ndarray, probability: np.ndarray, result: dict | None = None, title: str = "Ranking of the test images"
) -> Figure:
    """Two panels with their chance lines; `result` (of `metrics.evaluate`) adds the areas and the operating point."""
    target, result = np.asarray(target), result or {}
    title = f"{title} (n = {len(target)}, {target.sum()} malignant)"
    if not 0 < target.sum() < len(target):
        return _note(title, "undefined: both classes are needed")
    fpr, tpr, _ = roc_curve(target, probability)
    precision, recall, _ = precision_recall_curve(target, probability)
    figure = _figure(title, 5.2)
    left = _axes(figure, "1 - specificity", "sensitivity", (1, 2, 1))
    left.plot(fpr, tpr, color=MALIGNANT, lw=2, label=_with_interval("ROC AUC", result, "roc_auc"))
    left.plot([0, 1], [0, 1], color=GREY, ls=":", label="chance, 0.5")
    right = _axes(figure, "recall (sensitivity)", "precision", (1, 2, 2))
    label = _with_interval("average precision", result, "average_precision")
    right.step(recall, precision, where="post", color=MALIGNANT, lw=2, label=label)
    right.axhline(target.mean(), color=GREY, ls=":", label=f"prevalence, {target.mean():.3g}")
    if result:
        style = {"c": INK, "marker": "o", "ms": 9, "mfc": "none", "mew": 2, "ls": "none", "clip_on": False, "zorder": 5}
        style["label"] = f"threshold {result['threshold']:.3g}"
        left.plot(1 - result["specificity"], result["recall"], **style)
        if result["precision"] is not None:
            right.plot(result["recall"], result["precision"], **style)
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), box_aspect=1, anchor="N")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=SMALL, frameon=False)
    return figure


def tsne(
    embedding: np.ndarray,
    target: np.ndarray,
    title: str,
    patients: Sequence | None = None,
    class_names: Sequence[str] = tuple(CLASSES),
    seed: int = 0,
) -> Figure:
    """t-SNE (van der Maaten & Hinton, JMLR 2008) of embedding [N, D], coloured by target int [N].

    With `patients` the images of one patient are joined by a thin line. Fewer than four images, or all at one point (a
    collapsed network), have no map: the figure says so.
    """
    embedding, target = np.asarray(embedding, dtype=np.float64), np.asarray(target)
    n = len(embedding)
    title = f"{title} (t-SNE, n = {n})"
    if n < 4:
        return _note(title, f"t-SNE needs at least 4 images, here are {n}")
    if not np.isfinite(embedding).all():
        return _note(title, "the embedding holds values that are not finite")
    if np.ptp(embedding, axis=0).max() < 1e-9:
        return _note(title, "every image has the same embedding: the network has collapsed")
    start = "pca" if embedding.shape[1] > 1 else "random"
    method = TSNE(perplexity=min(30, (n - 1) / 3), init=start, random_state=seed)
    with threadpool_limits(1):  # threads add in another order each time, and t-SNE magnifies the rounding
        points = method.fit_transform(embedding)  # [N, 2]
    figure = _figure(title, 7)
    axes = _axes(figure, "t-SNE's axes and distances have no unit", "")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if patients is not None:
        codes = patient_codes(patients, n)
        lines = [points[codes == code] for code in np.flatnonzero(np.bincount(codes) > 1)]
        axes.add_collection(LineCollection(lines, colors=GREY, lw=0.6, alpha=0.5, zorder=1, label="same patient"))
    colours = (BENIGN, MALIGNANT) if len(class_names) == 2 else matplotlib.color_sequences["petroff10"]
    for index, name in enumerate(class_names):
        of_class = points[target == index]
        style = {"color": colours[index % len(colours)], "marker": "o^"[index % 2], "s": np.clip(6000 / n, 8, 45)}
        axes.scatter(*of_class.T, label=f"{name} ({len(of_class)})", alpha=0.8, lw=0, **style)
    _shared_legend(figure)
    return figure


def image_sheet(
    images: np.ndarray,
    titles: Sequence[str] = (),
    columns: int = 8,
    target: np.ndarray | None = None,
    title: str = "Inputs",
) -> Figure:
    """Contact sheet of images [N, H, W, 3 or 1], any dtype, values in 0..255; `target` int [N] colours their frames."""
    images = np.clip(np.asarray(images), 0, 255).astype(np.uint8)
    title = f"{title} (n = {len(images)})"
    if not len(images):
        return _note(title, "no images")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = WIDTH / columns  # inches
    figure = _figure(title, 0.9 + rows * (cell + 0.2 * bool(titles)))
    for index, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, index + 1, xticks=[], yticks=[])
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.spines[:].set_visible(target is not None)
        if target is not None:
            axes.spines[:].set(linewidth=3, color=(BENIGN, MALIGNANT)[int(target[index])])
        if index < len(titles):
            axes.set_title(titles[index], fontsize=min(SMALL, 8.5 * cell), color=INK, pad=3)
    if target is not None:
        handles = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in CLASSES.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def distance_histogram(
    positive: np.ndarray, negative: np.ndarray, margin: float | None = None, title: str = "Distances between embeddings"
) -> Figure:
    """Euclidean distances [N] of pairs of one class (positive) and [M] of two classes (negative), each as a density."""
    pairs = {"same class": np.asarray(positive, dtype=float), "different class": np.asarray(negative, dtype=float)}
    everything = np.concatenate(list(pairs.values()))
    title = f"{title} ({len(positive):,} positive, {len(negative):,} negative pairs)"
    if not len(everything) or not np.isfinite(everything).all():
        return _note(title, "some distances are not finite" if len(everything) else "no pairs")
    figure = _figure(title, 4.5)
    axes = _axes(figure, "Euclidean distance", "density of pairs")
    edges = np.linspace(0, 1.02 * max(everything.max(), margin or 0, 1e-6), 51)
    for (label, values), colour in zip(pairs.items(), (GREEN, PURPLE), strict=True):
        if len(values):
            axes.hist(values, edges, density=True, color=colour, alpha=0.35)
            label = f"{label}, mean {values.mean():.3g}"
            axes.hist(values, edges, density=True, color=colour, histtype="step", lw=2, label=label)
    if margin is not None:
        axes.axvline(margin, color=INK, ls=":", lw=2, label=f"margin {margin:g}")
    axes.set_xlim(0, edges[-1])
    axes.legend(fontsize=SMALL, frameon=False)
    return figure


def k_shot(curve: dict[str, dict | None], classifier: float | None = None, title: str = "k-shot") -> Figure:
    """ROC AUC of the bare embedding by references a class, as `quality.k_shot` gives it; `classifier`: its AUC."""
    known = {shots: result for shots, result in curve.items() if result}
    title = f"{title}: the embedding with k known lesions of each class"
    if not known:
        return _note(title, "too few lesions of one class")
    figure = _figure(title, 4.2)
    axes = _axes(figure, "known lesions of each class", "ROC AUC")
    mean = np.array([result["mean"] for result in known.values()])
    low, high = (np.array([result[side] for result in known.values()]) for side in ("low", "high"))
    error = np.abs([mean - low, high - mean])
    axes.errorbar(range(len(known)), mean, error, c=GREEN, marker="o", capsize=4, lw=1.8, label="mean, 5-95 % of draws")
    for place, value in enumerate(mean):
        axes.annotate(f"{value:.3f}", (place, value), (8, -16), textcoords="offset points", fontsize=SMALL, color=INK)
    if classifier is not None:
        axes.axhline(classifier, color=PURPLE, ls=":", lw=2, label=f"the classifier, {classifier:.3f}")
    axes.set_xticks(range(len(known)), list(known))
    axes.set_xlim(-0.4, len(known) - 0.4)
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right")
    return figure


def reliability(
    target: np.ndarray,
    probability_before: np.ndarray,
    probability_after: np.ndarray | None = None,
    title: str = "Reliability",
    prevalence: float | None = None,
    labels: tuple[str, str] = ("before calibration", "after calibration"),
) -> Figure:
    """Share of malignant images, with Wilson's 95 % interval, in the bins of `ece`, and the counts below.

    With `prevalence` the shares and their intervals are moved, in odds, to where that share of all images is malignant,
    and the axes are logarithmic, because most of them are small then.
    """
    target = np.asarray(target)
    title = f"{title} (n = {len(target)}, {target.sum()} malignant)"
    if not len(target):
        return _note(title, "no images")
    series = [("model" if probability_after is None else labels[0], probability_before, PURPLE, "s")]
    if probability_after is not None:
        series.append((labels[1], probability_after, GREEN, "o"))
    figure = _figure(title, 7.5)
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
    upper = _axes(figure, "", "share that is malignant", (grid[0],))
    lower = _axes(figure, "predicted probability", "images", (grid[1],))
    diagonal = np.geomspace(FLOOR, 1, 50) if prevalence else [0, 1]
    upper.plot(diagonal, diagonal, color=GREY, ls=":", label="perfectly calibrated")
    limit = 0.0
    for label, probability, colour, marker in series:
        bins = calibration_bins(probability)
        mean = np.array([np.mean(probability[bins == b]) for b in np.unique(bins)])
        hits = np.array([target[bins == b].sum() for b in np.unique(bins)])
        n = np.unique(bins, return_counts=True)[1]
        bounds = [binomtest(int(k), int(m)).proportion_ci(method="wilson") for k, m in zip(hits, n, strict=True)]
        shares = np.stack([hits / n, *np.transpose(bounds)])  # [3, bins]: the share, from, to
        if prevalence and 0 < target.mean() < 1:
            shares = np.maximum(correct_prior(shares, target.mean(), prevalence), FLOOR)
        error = np.abs(shares[1:] - shares[0])
        upper.errorbar(mean, shares[0], error, c=colour, marker=marker, lw=1.8, elinewidth=1, capsize=3, label=label)
        edges = np.geomspace(FLOOR, 1, 51) if prevalence else np.linspace(0, 1, 51)
        lower.hist(np.maximum(probability, edges[0]), edges, color=colour, histtype="step", lw=1.8)
        limit = max(limit, mean.max(), shares[2].max())
    if prevalence:
        upper.set(xscale="log", yscale="log", xlim=(FLOOR, 1), ylim=(FLOOR, 1.1))
        lower.set(xscale="log")
    else:
        upper.set(xlim=(0, min(1, 1.05 * limit)), ylim=(0, min(1, 1.05 * limit)))
    lower.set(xlim=upper.get_xlim(), yscale="log")
    for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    upper.legend(fontsize=SMALL, frameon=False, loc="upper left")
    return figure


def decision_curves(curves: dict[str, dict], title: str = "Decision curve") -> Figure:
    """One panel for each result of `decision_curve.decision_curve`: net benefit of the model, with its 95 % band, of
    treating all and of treating none."""
    defined = {name: curve for name, curve in curves.items() if "undefined" not in curve}
    if not defined:
        return _note(title, "undefined: both classes are needed")
    first = next(iter(defined.values()))
    figure = _figure(f"{title} (n = {first['n']}, {first['n_malignant']} malignant)", 4.8)
    for place, (name, curve) in enumerate(defined.items(), start=1):
        axes = _axes(figure, "threshold probability", "net benefit an image", (1, len(defined), place))
        x = np.array(curve["thresholds"])
        banded = [(at, *bounds) for at, bounds in zip(x, curve["model_ci95"], strict=True) if bounds]
        if banded:
            axes.fill_between(*np.transpose(banded), color=GREEN, alpha=0.2, lw=0)
        axes.plot(x, curve["model"], color=GREEN, lw=2, label="this model, 95 % band")
        axes.plot(x, curve["treat_all"], color=PURPLE, ls="--", label="treat all")
        axes.axhline(0, color=INK, ls=":", label="treat none")
        top = curve["prevalence"]
        axes.set(xlim=(x[0], x[-1]), ylim=(-0.35 * top, 1.1 * top), title=f"{name}, {100 * top:.3g} % malignant")
        axes.title.set(fontsize=TEXT, color=INK)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    _shared_legend(figure)
    return figure


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.suptitle(title, fontsize=TEXT + 1, color=INK, wrap=True)
    return figure


def _axes(figure: Figure, xlabel: str, ylabel: str, position: tuple = (1, 1, 1)) -> Axes:
    axes = figure.add_subplot(*position)
    axes.set_xlabel(xlabel, fontsize=TEXT, color=INK)
    axes.set_ylabel(ylabel, fontsize=TEXT, color=INK)
    axes.tick_params(labelsize=SMALL, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    return axes


def _note(title: str, text: str) -> Figure:
    """A figure that says why there is nothing to show."""
    figure = _figure(title, 2.5)
    figure.text(0.5, 0.45, text, ha="center", va="center", fontsize=TEXT, color=INK, wrap=True)
    return figure


def _shared_legend(figure: Figure) -> None:
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for each in found for handle, label in zip(*each, strict=True)}
    style = {"loc": "outside lower center", "fontsize": SMALL, "frameon": False, "markerscale": 1.5}
    figure.legend(handles.values(), handles, ncols=min(len(handles), 5), **style)


def _with_interval(label: str, result: dict, name: str) -> str:
    bounds = result.get(f"{name}_ci95")
    between = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
    return f"{label} {result[name]:.3f}{between}" if result else label
