"""The report of a data set: report.md and report.png, written beside its manifest."""

from pathlib import Path

import numpy as np
import pandas as pd

from Modules.data.manifest import LABELS, SPLITS
from Modules.data.metadata import UNKNOWN, age_band

SHOWN = 50  # rows of a list; the manifest has them all
SITES = 8  # the most frequent ones in the figure
COLOURS = {"train": "#4c72b0", "validation": "#dd8452", "test": "#55a868", "external": "#8c8c8c"}


def write_report(folder: Path, images: pd.DataFrame, pairs: pd.DataFrame, options: dict) -> None:
    """Write report.md and report.png into `folder`.

    `images`: what `plan` returns of a scanned table; `pairs`: every pair of ids of the same picture (`first`, `second`,
    `kind`), "official" ones included; `options`: how the data set was made.
    """
    images = images.assign(
        age=age_band(images["age_approx"]),
        sex=images["sex"].fillna(UNKNOWN),
        site=images["anatom_site_general_challenge"].fillna(UNKNOWN),
    )
    used = images[images["split"] != "excluded"]
    sections = [
        f"# Data set of {len(used):,} images\n\n"
        + "\n".join(f"* {name}: {value}" for name, value in options.items() if value not in (None, []))
        + "\n\n![Counts and distributions per split](report.png)",
        "## Splits\n\n" + _markdown(_splits(used)),
        "## Images per patient (or group, where no patient is known)\n\n" + _markdown(_per_patient(used)),
        *(
            f"## {title}\n\nImages, and how many of them malignant.\n\n" + _markdown(_by(used, column))
            for column, title in (("sex", "Sex"), ("age", "Age (years)"), ("site", "Site"))
        ),
        "## Left out\n\n" + _left_out(images[images["split"] == "excluded"]),
        "## Duplicate pairs\n\n" + _duplicates(pairs, images.set_index("isic_id")["source"]),
        "## Converted when read\n\n" + _converted(used),
    ]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    _draw(used, folder / "report.png")


def _splits(used: pd.DataFrame) -> pd.DataFrame:
    rows = {}
    for split, part in _parts(used):
        malignant = int(part["target"].sum())
        rows[split] = {
            "images": len(part),
            LABELS[0]: len(part) - malignant,
            LABELS[1]: malignant,
            "malignant %": f"{100 * malignant / len(part):.2f}",
            "groups": part["group"].nunique(),
            "patients": part["patient_id"].nunique() or UNKNOWN,
            "balanced set": int(part["balanced"].sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def _per_patient(used: pd.DataFrame) -> pd.DataFrame:
    rows = {}
    for split, part in _parts(used):
        sizes = part.groupby(part["patient_id"].fillna(part["group"])).size()
        rows[split] = {"median": f"{sizes.median():g}", "mean": f"{sizes.mean():.1f}", "largest": sizes.max()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def _by(used: pd.DataFrame, column: str) -> pd.DataFrame:
    counts = used.groupby([column, "split"])["target"].agg(["size", "sum"])
    text = counts["size"].map("{:,}".format) + " (" + counts["sum"].map("{:,}".format) + ")"
    return text.unstack("split").reindex(columns=[split for split, _ in _parts(used)]).fillna("0")


def _left_out(excluded: pd.DataFrame) -> str:
    if excluded.empty:
        return "Nothing."
    counts = excluded["reason"].str.partition(":")[0].value_counts().rename_axis("reason").to_frame("images")
    listed = excluded.set_index("isic_id")[["reason", "duplicate_of", "path"]].fillna("").head(SHOWN)
    more = f"\n\nand {len(excluded) - SHOWN:,} more in manifest.csv" if len(excluded) > SHOWN else ""
    return f"{_markdown(counts)}\n\n{_markdown(listed)}{more}"


def _duplicates(pairs: pd.DataFrame, source: pd.Series) -> str:
    keys = [frozenset(ends) for ends in zip(pairs["first"], pairs["second"], strict=True)]
    official = {key for key, kind in zip(keys, pairs["kind"], strict=True) if kind == "official"}
    found = {key: kind for key, kind in zip(keys, pairs["kind"], strict=True) if kind != "official"}
    beyond = {key: kind for key, kind in found.items() if key not in official}
    lines = [
        f"Of the official list {len(official):,} pairs have both pictures here; "
        f"{len(official & found.keys()):,} of them were also found by looking. Found beyond the list: {len(beyond):,}."
    ]
    if beyond:
        rows = [
            (kind, *sorted(key), " and ".join(sorted({source[name] for name in key}))) for key, kind in beyond.items()
        ]
        rows.sort(key=lambda row: (" and " not in row[3], row))  # those across two sources first
        listed = pd.DataFrame(rows, columns=["kind", "image", "and image", "source"]).set_index("kind")
        counts = listed.groupby(["kind", "source"]).size().rename("pairs").reset_index("source")
        lines += [_markdown(counts), _markdown(listed.head(SHOWN))]
        if len(listed) > SHOWN:
            lines.append(f"and {len(listed) - SHOWN:,} more")
    return "\n\n".join(lines)


def _converted(used: pd.DataFrame) -> str:
    notes = used["notes"].str.split(", ").explode()
    counts = notes[notes != ""].value_counts().rename_axis("what").to_frame("images")
    return _markdown(counts) if len(counts) else "Nothing."


def _parts(used: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The splits that hold any image, in their order."""
    return [(split, used[used["split"] == split]) for split in SPLITS if (used["split"] == split).any()]


def _markdown(table: pd.DataFrame) -> str:
    def line(cells) -> str:
        return (
            "| " + " | ".join(f"{cell:,}" if isinstance(cell, int | np.integer) else str(cell) for cell in cells) + " |"
        )

    header = [table.index.name, *table.columns]
    rule = ["---", *("---:" if isinstance(value, int | np.integer) else "---" for value in table.iloc[0])]
    return "\n".join([line(header), line(rule), *map(line, table.itertuples())])


def _draw(used: pd.DataFrame, path: Path) -> None:
    """Four panels: counts per class, and how alike the splits are in age, site and images per patient."""
    from matplotlib.figure import Figure  # a second: only who draws waits for it

    parts = _parts(used)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    width = 0.8 / len(parts)
    for number, (split, part) in enumerate(parts):
        colour, shift = COLOURS[split], (number - (len(parts) - 1) / 2) * width
        counts = [int((part["target"] == target).sum()) for target in range(len(LABELS))]
        bars = axes[0, 0].bar(np.arange(2) + shift, counts, width, color=colour, label=split)
        axes[0, 0].bar_label(bars, fmt="{:,.0f}", fontsize=8)
        ages = part["age"].value_counts(normalize=True).reindex(sorted(used["age"].unique()), fill_value=0)
        axes[0, 1].bar(np.arange(len(ages)) + shift, 100 * ages, width, color=colour)
        sites = (
            part["site"].value_counts(normalize=True).reindex(used["site"].value_counts().index[:SITES], fill_value=0)
        )
        axes[1, 0].barh(np.arange(len(sites)) + shift, 100 * sites, width, color=colour)
        sizes = np.sort(part.groupby(part["patient_id"].fillna(part["group"])).size())
        axes[1, 1].step(sizes, 100 * np.arange(1, len(sizes) + 1) / len(sizes), where="post", color=colour)
    axes[0, 0].set(title="Images", yscale="log", xticks=[0, 1], xticklabels=LABELS)
    axes[0, 0].legend()
    axes[0, 1].set(title="Age (years)", ylabel="% of images", xticks=range(len(ages)), xticklabels=ages.index)
    axes[1, 0].set(title="Site", xlabel="% of images", yticks=range(len(sites)), yticklabels=sites.index)
    axes[1, 0].invert_yaxis()
    axes[1, 1].set(title="Images per patient", ylabel="% of patients with at most as many", xlabel="images")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
