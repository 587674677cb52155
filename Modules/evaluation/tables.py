"""The numbers of best_epoch.json as tables that people read, for the report and the model card alike."""

from typing import NamedTuple

from Modules.evaluation.cross_validation import SCORERS

METRICS = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "pauc_above_80_tpr": "partial AUC above 80 % sensitivity (0 to 0.2)",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "specificity_at_90_sensitivity": "specificity at 90 % sensitivity",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall": "sensitivity (recall)",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "ppv": "positive predictive value at {prevalence}",
    "npv": "negative predictive value at {prevalence}",
    "brier": "Brier score",
    "ece": "expected calibration error",
}
EMBEDDING = {
    "recall_at_1": "nearest known lesion is of the same class",
    "knn_roc_auc": "ROC AUC of the nearest known lesions",
    "silhouette": "silhouette (-1 to 1)",
    "mean_positive_distance": "mean distance within a class",
    "mean_negative_distance": "mean distance between the classes",
    "collapsed": "collapsed",
}
VIEWS = {"test": "test, 50/50", "test_full": "whole test split"}
BASELINES = {"baseline": "frozen features + logistic regression", "baseline_finetune": "fine-tuned with cross-entropy"}
SHORTCUTS = {"whole": "the whole picture", "lesion_covered": "lesion covered", "rim_alone": "rim of the picture alone"}


class Cell(NamedTuple):
    """A number, or what stands in its place; its 95 % interval; whether it rests on too few images."""

    text: str
    interval: str = ""
    faint: bool = False


class Table(NamedTuple):
    header: list[str]
    rows: list[list[Cell]]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def shown(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cell(result: dict, name: str, faint: bool = False) -> Cell:
    """A metric of `metrics.evaluate` with its interval, or why it is undefined."""
    if result[name] is None:
        return Cell(f"undefined: {result.get('undefined', {}).get(name, 'not computed')}", faint=True)
    bounds = result.get(f"{name}_ci95")
    return Cell(shown(result[name]), f"{bounds[0]:.3f}\u2013{bounds[1]:.3f}" if bounds else "no interval", faint)


def plain(header: list[str], rows: list) -> Table:
    return Table(header, [[value if isinstance(value, Cell) else Cell(shown(value)) for value in row] for row in rows])


def metrics(columns: dict[str, dict], prevalence: float) -> Table:
    """Every metric, one column for each result of `metrics.evaluate`."""
    rows = [[name.format(prevalence=percent(prevalence)), *(cell(result, key) for result in columns.values())]
            for key, name in METRICS.items()]  # fmt: skip
    counts = [
        ["images", *(result["n"] for result in columns.values())],
        ["malignant", *(result["n_malignant"] for result in columns.values())],
        ["patients", *(result["n_patients"] for result in columns.values())],
    ]
    return plain(["", *columns], counts + rows)


def results(facts: dict) -> Table:
    """This model on both views, and the baselines that were trained beside it on the 50/50 set."""
    columns = {title: facts[view] for view, title in VIEWS.items()}
    columns |= {f"{title}, 50/50": facts[key]["test"] for key, title in BASELINES.items() if facts.get(key)}
    return metrics(columns, facts["prevalence"])


def used(facts: dict) -> Table:
    rows = []
    for name, counts in facts["used"]["splits"].items():
        share = percent(counts["malignant"] / counts["images"])
        rows.append([name, counts["images"], counts["malignant"], share, counts["patients"]])
    return plain(["split", "images", "malignant", "share", "patients"], rows)


def calibration(facts: dict) -> Table:
    """Brier score and ECE before and after, wherever they were measured."""
    fitted = facts["calibration"]
    which = " of the first round" if facts.get("rounds", 1) == 2 else ""
    places = {
        "validation": f"validation, {fitted['method']} scaling{which} fitted here",
        "test": "test, 50/50, the same scaling",
        "at_prevalence": f"whole test split weighted to {percent(fitted['prevalence'])}, prior correction",
    }
    rows = []
    for key, title in places.items():
        before, after = fitted[key]["before"], fitted[key]["after"]
        rows.append([title, cell(before, "brier"), cell(after, "brier"), cell(before, "ece"), cell(after, "ece")])
    return plain(["", "Brier before", "after", "ECE before", "after"], rows)


def subgroups(rows: list[dict]) -> Table:
    table = []
    for row in rows:
        cells = [cell(row, name, faint=name in row["too_few"]) for name in ("roc_auc", "recall", "specificity")]
        table.append([f"{row['stratum']}: {row['value']}", f"{row['n']:,} ({row['n_malignant']:,})", *cells])
    return plain(["", "images (malignant)", "ROC AUC", "sensitivity", "specificity"], table)


def shortcuts(facts: dict) -> Table:
    rows = [[SHORTCUTS[name], cell(view, "roc_auc")] for name, view in facts["shortcuts"]["views"].items()]
    return plain(["what the model sees", "ROC AUC"], rows)


def embedding(facts: dict) -> Table:
    rows = [[name, *(facts[view]["embedding"].get(key) for view in VIEWS)] for key, name in EMBEDDING.items()]
    return plain(["", *VIEWS.values()], rows)


def configuration(facts: dict) -> Table:
    rows = []
    for stage, values in facts["config"].items():
        items = values.items() if isinstance(values, dict) else [("", values)]
        for name, value in items:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append([f"{stage} {name}".strip().replace("_", " "), text])
    return plain(["setting", "value"], rows)


def environment(facts: dict) -> Table:
    rows = [*facts["versions"].items(), ("precision of training", facts["precision"])]
    rows += [(f"minutes, {stage}", f"{seconds / 60:.1f}") for stage, seconds in facts["seconds"].items()]
    return plain(["", ""], rows)


def differences(rows: list[dict]) -> Table:
    table = []
    for row in rows:
        table.append([row["what"], row["here"], row["training"], f"{row['shift']:+.1f} sd" if "shift" in row else "-"])
    return plain(["", "here", "training", "shift"], table)


def comparison(result: dict) -> Table:
    rows = []
    for name, row in result["differences"].items():
        if row["difference"] is None:
            change = Cell(f"undefined: {row['reason']}", faint=True)
        else:
            bounds = row["ci95"]
            change = Cell(
                f"{row['difference']:+.3f}", f"{bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else "no interval"
            )
        label = METRICS[name].format(prevalence="the stated prevalence")
        rows.append([label, row["first"], row["second"], change])
    return plain(["", "this model", "the other", "difference"], rows)


def cross_validation(pooled: dict, prevalence: float) -> tuple[Table, Table]:
    """What `cross_validation.pool` found on every image: each scorer's metrics, and by how much the classifier beats
    the others."""
    scorers = {SCORERS.get(name, name): result for name, result in pooled["test_full"].items()}
    rows = []
    for name, metrics_of in pooled["difference"]["test_full"].items():
        row = [SCORERS.get(name, name)]
        for gain in metrics_of.values():
            bounds = gain["ci95"]
            interval = f"{bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else "no interval"
            row.append("-" if gain["estimate"] is None else Cell(f"{gain['estimate']:+.3f}", interval))
        rows.append(row)
    first = next(iter(pooled["difference"]["test_full"].values()), {})
    header = ["this model less", *(METRICS[name] for name in first)]
    return metrics(scorers, prevalence), plain(header, rows)
