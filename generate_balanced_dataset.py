"""From a folder of pictures and a table to a data set that cannot leak.

    python generate_balanced_dataset.py                              datasets/smaller -> datasets/balanced
    python generate_balanced_dataset.py --source DIR --output DIR    other folders
    python generate_balanced_dataset.py --folds 5                    also folds, for train.py --fold 0
    python generate_balanced_dataset.py --keep datasets/balanced     new pictures came; those known stay where they were
    python generate_balanced_dataset.py --keep splits/isic2020.csv   the canonical split of ISIC 2020
    python generate_balanced_dataset.py --external ../ham10000       more training data, from another source

DIR holds train-metadata.csv (isic_id and target; patient_id, lesion_id, diagnosis, ... where known) and the pictures
in train-image/ or train-image/image/. Each file is opened once and vetted; pictures shown twice are found, listed
officially or not; what belongs together (patient, lesion, duplicate) stays in one split: 70 % training, 10 %
validation, 20 % test. The balanced set is as many benign as malignant images of each split.

Written into the output folder, which is replaced only when everything is done:
    manifest.csv, manifest.json            every listed image, where it went and why; how it was made
    {train,validation,test}/{benign,malignant}/ID.jpg, external/...    every usable image
    report.md, report.png                  counts per split, class, sex, age and site; what was excluded
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from Modules.cli import Parser, UserError, run
from Modules.data.duplicates import near_duplicates
from Modules.data.groups import equal_pairs
from Modules.data.images import scan
from Modules.data.manifest import LABELS, SPLITS, TABLE, write_manifest
from Modules.data.metadata import DUPLICATES, read_official, read_sources, read_table, same_ids, shown
from Modules.data.output import check_output, replacing, write_pictures
from Modules.data.plan import plan, read_kept
from Modules.data.report import write_report
from Modules.data.splits import SHARES

UNUSABLE = ("absent", "unreadable", "tiny", "blank")  # reasons of the scan, before the colon
SHOWN = 10  # unusable files that the summary names
SOURCE, OUTPUT = Path("datasets/smaller"), Path("datasets/balanced")


def generate(
    source: Path = SOURCE,
    output: Path = OUTPUT,
    duplicates: Path | None = None,
    external: Sequence[Path] = (),
    table: Path | None = None,
    size: int = 256,
    seed: int = 0,
    folds: int = 0,
    keep: Path | None = None,
    max_excluded: int | None = None,
    drop_diagnosis: Sequence[str] = (),
) -> pd.DataFrame:
    """Make the data set `output` from `source` and return its manifest; the arguments are the command line's options.

    Raises UserError; a data set that stood in `output` is then as it was.
    """
    output = Path(output).resolve()
    check_output(output, [source, *external])
    options = {
        "source": str(source),
        "external": [str(folder) for folder in external],
        "duplicates": duplicates and str(duplicates),
        "metadata": table and str(table),
        "keep": keep and str(keep),
        "size": size,
        "seed": seed,
        "folds": folds,
        "max_excluded": max_excluded,
        "drop_diagnosis": list(drop_diagnosis),
    }
    kept = read_kept(keep) if keep else None

    # ---- read and scan -----------------------------------------------------------------------------------------------
    images = read_sources(source, external, table)
    unwanted = unwanted_diagnoses(images["diagnosis"], drop_diagnosis)
    images = images.join(scan(images["file"].tolist()).astype({"reason": "str"}))
    check_excluded(images, max_excluded)
    seen = images[images["reason"].isna()]
    images["reason"] = images["reason"].fillna(unwanted)

    # ---- group, split, balance ---------------------------------------------------------------------------------------
    official = read_official(source, duplicates)
    official = official[official["first"].isin(seen["isic_id"]) & official["second"].isin(seen["isic_id"])]
    equal = equal_pairs(seen, "sha256", "byte-identical"), equal_pairs(seen, "pixels", "same pixels")
    pairs = pd.concat([*equal, official, same_ids(seen), near_pairs(seen)], ignore_index=True)
    images = plan(images, pairs, seed, folds, kept)
    check_classes(images, folds)

    # ---- write -------------------------------------------------------------------------------------------------------
    with replacing(output) as folder:
        images = write_pictures(images, folder, output, size)
        write_manifest(folder, images, options)
        write_report(folder, images, pairs, options)
    return images


def write_list(table: Path, path: Path, duplicates: Path | None = None, seed: int = 0, folds: int = 0) -> pd.DataFrame:
    """Split the images of `table` without looking at a picture and write isic_id, split, balanced, fold to `path`."""
    images = read_table(table).assign(external=False, bytes=0, reason=pd.Series(dtype="str"))
    images = plan(images, read_official(table.parent, duplicates), seed, folds)
    check_classes(images, folds)
    try:
        images[["isic_id", "split", "balanced", "fold"]].to_csv(path, index=False, lineterminator="\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return images


def check_excluded(images: pd.DataFrame, limit: int | None) -> None:
    """More unusable files than expected are a sign of a broken copy, not of a few bad files."""
    bad = images[images["reason"].notna()]
    limit = max(3, len(images) // 100) if limit is None else limit
    if len(bad) > limit:
        named = shown(f"{name}: {reason}" for name, reason in zip(bad["isic_id"], bad["reason"], strict=True))
        raise UserError(
            f"{len(bad):,} of {len(images):,} listed images can't be used ({named}); --max-excluded is {limit}"
        )


def unwanted_diagnoses(diagnosis: pd.Series, names: Sequence[str]) -> pd.Series:
    """Why an image is left out for its diagnosis, NA where it isn't one of `names`."""
    diagnosis = diagnosis.str.lower()
    for name in names:
        if not (diagnosis == name.lower()).any():
            known = ", ".join(sorted(diagnosis.dropna().unique())) or "none: the table has no diagnosis"
            raise UserError(f"--drop-diagnosis {name}: no image has it; known: {known}")
    return ("diagnosis: " + diagnosis).where(diagnosis.isin([name.lower() for name in names]))


def near_pairs(images: pd.DataFrame) -> pd.DataFrame:
    """Pairs of ids whose pictures show the same, found by looking."""
    pairs = near_duplicates(images["file"].tolist())
    ids = images["isic_id"].to_numpy(dtype=object)
    return pairs.assign(first=ids[pairs["first"]], second=ids[pairs["second"]])


def check_classes(images: pd.DataFrame, folds: int) -> None:
    """Every split and every fold needs both classes."""
    for target, label in enumerate(LABELS):
        rows = images[(images["target"] == target) & images["split"].isin(list(SHARES))]
        for what, there, needed in (("splits", rows["split"], len(SHARES)), ("folds", rows["fold"], folds)):
            if there[there != -1].nunique() < needed:
                raise UserError(
                    f"{needed} {what} need as many groups (patients) that hold a {label} image and can be told apart; "
                    f"the data have {rows['group'].nunique()}"
                )


def summary(images: pd.DataFrame) -> str:
    """What was made, in 80 columns."""
    lines = [f"{'split':<12}{'benign':>10}{'malignant':>11}{'groups':>9}{'balanced set':>22}"]
    for split in SPLITS[:-1]:
        rows = images[images["split"] == split]
        if len(rows) or split != "external":
            counts = [int((rows["target"] == target).sum()) for target in (0, 1)]
            half = int(rows["balanced"].sum()) // 2
            lines.append(
                f"{split:<12}{counts[0]:>10,}{counts[1]:>11,}{rows['group'].nunique():>9,}{f'{half:,} + {half:,}':>22}"
            )
    own = images[images["split"].isin(list(SHARES))]
    shares = own["split"].value_counts(normalize=True)
    if any(abs(shares.get(split, 0) - share) > 0.02 for split, share in SHARES.items()):
        largest = own["group"].value_counts().iloc[0]
        lines.append(f"shares are off 70/10/20: groups stay whole, the largest holds {largest:,} images")
    left_out = images[images["split"] == "excluded"]
    kind = left_out["reason"].str.split(":").str[0]
    lines += [f"{'left out':<12}{count:>10,} {reason}" for reason, count in kind.value_counts().items()]
    for row in left_out[kind.isin(UNUSABLE)].head(SHOWN).itertuples():
        lines.append("  " + textwrap.shorten(f"{row.isic_id}: {row.reason}", 78))
    if (more := int(kind.isin(UNUSABLE).sum()) - SHOWN) > 0:
        lines.append(f"  and {more:,} more in {TABLE}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="data set in Kaggle's layout (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to make or replace (%(default)s)")
    parser.add_argument("--duplicates", type=Path, help=f"pairs of ids; by default the source's {DUPLICATES}")
    parser.add_argument("--external", type=Path, action="append", default=[], help="one more set, for training only")
    parser.add_argument("--metadata", type=Path, help="table that fills what the source's own leaves empty, by id")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the written pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split (%(default)s)")
    parser.add_argument("--folds", type=int, default=0, help="folds for cross-validation (none)")
    parser.add_argument(
        "--keep", type=Path, help="a former data set, its manifest or a list: known images stay in place"
    )
    parser.add_argument(
        "--max-excluded", type=int, help="unusable files to put up with (1 %% of the files, at least 3)"
    )
    parser.add_argument(
        "--drop-diagnosis", nargs="+", default=[], metavar="NAME", help="leave these out, e.g. bcc akiec"
    )
    parser.add_argument(
        "--list", type=Path, metavar="CSV", help="write only a list of the split of --metadata's images"
    )
    options = parser.parse_args(arguments)
    if not 32 <= options.size <= 4096:
        raise UserError(f"--size {options.size}: between 32 and 4096 pixels")
    if options.max_excluded is not None and options.max_excluded < 0:
        raise UserError(f"--max-excluded {options.max_excluded}: 0 or more")
    if options.folds < 0 or options.folds == 1:
        raise UserError(f"--folds {options.folds}: 2 or more, or 0 for none")
    if options.list and not options.metadata:
        raise UserError("--list needs --metadata, the table whose images it splits")
    return options


def main() -> None:
    options = vars(parse())
    table, path = options.pop("metadata"), options.pop("list")
    if path:
        images = write_list(table, path, options["duplicates"], options["seed"], options["folds"])
        print(f"{summary(images)}\nthe list, made without a look at the pictures:\n{path}")
        return
    images = generate(table=table, **options)
    print(f"\n{summary(images)}\nevery listed image, where it went and why:\n{options['output'] / TABLE}")


if __name__ == "__main__":
    run(main)
