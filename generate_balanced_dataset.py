"""From a folder of pictures and a table to a data set that cannot leak.

    python generate_balanced_dataset.py                              datasets/smaller -> datasets/balanced
    python generate_balanced_dataset.py --source DIR --output DIR    other folders
    python generate_balanced_dataset.py --folds 5                    also folds, for train.py --fold all
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

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from Modules.cli import Parser, UserError, run
from Modules.data import metadata
from Modules.data.groups import identical_pairs
from Modules.data.images import encode_jpeg, read_image, scan
from Modules.data.manifest import LABELS, SPLITS, TABLE, is_data_set, write_manifest
from Modules.data.plan import plan, read_kept

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
    output = Path(os.path.abspath(output))
    check_output(output, [source, *external])
    options = {
        "source": str(source),
        "external": [str(folder) for folder in external],
        "duplicates": duplicates and str(duplicates),
        "metadata": table and str(table),
        "keep": keep and str(keep),
        **{"size": size, "seed": seed, "folds": folds, "drop_diagnosis": list(drop_diagnosis)},
    }
    kept = read_kept(keep) if keep else None

    # ---- read and scan -----------------------------------------------------------------------------------------------
    images = read_sources(source, external, table)
    found = scan(images["file"].tolist())
    images = pd.concat([images, found], axis=1)
    images["reason"] = images["reason"].astype("str")
    check_excluded(images, max_excluded)
    drop_diagnoses(images, drop_diagnosis)

    # ---- group, split, balance ---------------------------------------------------------------------------------------
    official = read_official(source, duplicates)
    pairs = pd.concat([identical_pairs(images), official, near_pairs(images)], ignore_index=True)
    images = plan(images, pairs, seed, folds, kept)
    check_classes(images)

    # ---- write -------------------------------------------------------------------------------------------------------
    partial_folder = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        images = write_pictures(images, partial_folder, output, size)
        write_manifest(partial_folder, images, options)
        replace(partial_folder, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return images


def check_output(output: Path, sources: Sequence[Path]) -> None:
    """Refuse an output folder that holds something else than a former data set, or lies in the source."""
    if output.exists() and not is_data_set(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} holds something else than a data set of this script: move it away or name another")
    for source in sources:
        here, there = output.resolve(), Path(source).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(
                f"--output {output} and {source} lie in each other: name an output folder beside the source"
            )


def read_sources(source: Path, external: Sequence[Path], table: Path | None) -> pd.DataFrame:
    """All tables in one, with the columns source (a name), external (bool) and file (Path or None)."""
    tables = []
    for folder in (source, *external):
        own = metadata.read_metadata(folder, None if tables else table)
        files = metadata.find_pictures(folder)
        own["file"] = [files.get(name) for name in own["isic_id"]]
        if own["file"].isna().all():
            raise UserError(f"none of the {len(own):,} ids in {folder}'s table is the name of a picture in it")
        own["external"] = bool(tables)
        name = Path(folder).resolve().name
        own["source"] = name if all(name != other["source"].iloc[0] for other in tables) else f"{name}-{len(tables)}"
        tables.append(own)
        if own["patient_id"].isna().all():
            print(f"{folder}: no patient_id; groups come from lesions and duplicates alone")
    return pd.concat(tables, ignore_index=True)


def check_excluded(images: pd.DataFrame, limit: int | None) -> None:
    """More unusable files than expected are a sign of a broken copy, not of a few bad files."""
    bad = images[images["reason"].notna()]
    limit = max(3, len(images) // 100) if limit is None else limit
    if len(bad) > limit:
        named = metadata.shown(f"{name}: {reason}" for name, reason in zip(bad["isic_id"], bad["reason"], strict=True))
        raise UserError(
            f"{len(bad):,} of {len(images):,} listed images can't be used ({named}); --max-excluded is {limit}"
        )


def drop_diagnoses(images: pd.DataFrame, names: Sequence[str]) -> None:
    """Give the images of the diagnoses `names` a reason to be left out."""
    diagnosis = images["diagnosis"].str.lower()
    for name in names:
        if not (diagnosis == name.lower()).any():
            known = ", ".join(sorted(diagnosis.dropna().unique())) or "none: the table has no diagnosis"
            raise UserError(f"--drop-diagnosis {name}: no image has it; known: {known}")
        images.loc[(diagnosis == name.lower()) & images["reason"].isna(), "reason"] = f"diagnosis: {name}"


def read_official(source: Path, path: Path | None) -> pd.DataFrame:
    """The official duplicate pairs; the list that lies in the source where none is named."""
    if path is None and not (path := Path(source) / metadata.DUPLICATES).is_file():
        return pd.DataFrame({"first": [], "second": [], "kind": []}, dtype="str")
    return metadata.read_duplicates(path).assign(kind="official")


def near_pairs(images: pd.DataFrame) -> pd.DataFrame:
    """Pairs of ids whose pictures show the same, found by looking."""
    try:
        from Modules.data.duplicates import near_duplicates
    except ImportError:
        return pd.DataFrame({"first": [], "second": [], "kind": []}, dtype="str")
    seen = images[images["width"] > 0]
    pairs = near_duplicates(seen["file"].tolist())
    ids = seen["isic_id"].to_numpy(dtype=object)
    return pairs.assign(first=ids[pairs["first"]], second=ids[pairs["second"]])


def check_classes(images: pd.DataFrame) -> None:
    """Every split needs both classes."""
    for split in SPLITS[:3]:
        for target, label in enumerate(LABELS):
            if not ((images["split"] == split) & (images["target"] == target)).any():
                groups = images.loc[(images["target"] == target) & (images["split"] != "excluded"), "group"].nunique()
                raise UserError(
                    f"no {label} image for the {split} split: the data hold {groups} groups (patients) with one, "
                    "three or more are needed"
                )


def write_pictures(images: pd.DataFrame, folder: Path, output: Path, size: int) -> pd.DataFrame:
    """Write every usable image into `folder`; `images` with its path and sha256 there."""
    used = images["split"] != "excluded"
    images["path"] = [os.path.relpath(file, output) if isinstance(file, Path) else "" for file in images["file"]]
    places = images["split"] + "/" + images["target"].map(dict(enumerate(LABELS))) + "/" + images["isic_id"] + ".jpg"
    images.loc[used, "path"] = places[used]
    for place in {os.path.dirname(path) for path in images.loc[used, "path"]}:
        (folder / place).mkdir(parents=True)
    rows = list(images[used].itertuples())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = tqdm(
            pool.map(partial(write_picture, folder=folder, size=size), rows),
            "write",
            len(rows),
            unit=" images",
            ncols=80,
            disable=None,
        )
        images.loc[used, "sha256"] = list(hashes)
    return images


def write_picture(row, folder: Path, size: int) -> str:
    """Write one picture and return its sha256: a hard link where nothing changes, else resized, as JPEG."""
    place = folder / row.path
    if row.plain and row.width == row.height == size:
        try:
            os.link(row.file.resolve(), place)
        except OSError:  # another file system
            shutil.copyfile(row.file, place)
        return row.sha256
    data = encode_jpeg(read_image(row.file, size))
    place.write_bytes(data)
    return sha256(data).hexdigest()


def replace(new: Path, output: Path) -> None:
    """Put the folder `new` in the place of `output`."""
    former = output.with_name(f".{output.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if output.exists():
        output.rename(former)
    new.rename(output)
    shutil.rmtree(former, ignore_errors=True)


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
    left_out = images.loc[images["split"] == "excluded", "reason"].str.split(":").str[0].value_counts()
    if len(left_out):
        lines.append("left out    " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None):
    parser = Parser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="data set in Kaggle's layout (%(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to make or replace (%(default)s)")
    parser.add_argument("--duplicates", type=Path, help=f"pairs of ids; by default the source's {metadata.DUPLICATES}")
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
    options = parser.parse_args(arguments)
    if not 32 <= options.size <= 4096:
        raise UserError(f"--size {options.size}: between 32 and 4096 pixels")
    if options.folds < 0 or options.folds == 1:
        raise UserError(f"--folds {options.folds}: 2 or more, or 0 for none")
    return options


def main() -> None:
    options = vars(parse())
    images = generate(table=options.pop("metadata"), **options)
    print(f"\n{summary(images)}\n{options['output'] / TABLE}: every listed image, where it went and why")


if __name__ == "__main__":
    run(main)
