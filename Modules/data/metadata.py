"""The metadata of a data set in Kaggle's layout, read and checked: whatever is wrong is named by row and column.

    SOURCE/train-metadata.csv            isic_id (or image_name), target (or benign_malignant); the rest is optional
    SOURCE/train-image/[image/]ID.jpg    the pictures
    SOURCE/ISIC_2020_Training_Duplicates.csv    optional: pairs of ids that show the same picture

Rows are counted as a text editor shows them: the header is row 1.
"""

import codecs
import csv
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from Modules.cli import UserError
from Modules.data.images import EXTENSIONS

TABLE, DUPLICATES, PICTURES = "train-metadata.csv", "ISIC_2020_Training_Duplicates.csv", "train-image"
COLUMNS = (
    "isic_id",
    "patient_id",
    "lesion_id",
    "sex",
    "age_approx",
    "anatom_site_general_challenge",
    "diagnosis",
    "target",
)
ALIASES = {"image_name": "isic_id"}
ID = r"\w[\w.\- ]{0,127}"  # becomes a file's name: nothing that could leave the folder it belongs in
MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]
UNKNOWN = "unknown"
BYTE_LIMIT = 2**28  # of a table; ISIC 2020's has 2 MB
SHOWN = 3  # violations that a message names; the rest are counted


def read_metadata(source: Path, metadata: Path | None = None) -> pd.DataFrame:
    """The table of the data set in the folder `source`, COLUMNS in that order, in the file's order.

    ids and words are str or NA, `age_approx` float (years), `target` int (1 melanoma). `metadata` names a second table
    whose values fill what the first leaves empty, joined by id; it may also be the only one. Raises UserError.
    """
    if not Path(source).is_dir():
        raise UserError(f"no folder {source}: expected {TABLE} and {PICTURES}/ in it")
    own = Path(source) / TABLE
    if not own.is_file() and metadata is None:
        raise UserError(f"no {TABLE} in {source}: name the table with --metadata, or --source another folder")
    table = read_table(own) if own.is_file() else None
    if metadata is not None:
        extra = read_table(Path(metadata), target_required=table is None)
        table = extra if table is None else _join(table, extra, metadata)
    return table


def read_duplicates(path: Path) -> pd.DataFrame:
    """The official list of duplicates: columns `first` and `second`, ids of the same picture, no id with itself."""
    table = read_csv(Path(path))
    if len(table.columns) < 2:
        raise UserError(f"{path}: a list of duplicates has two columns of ids, this has {list(table.columns)}")
    pairs = table.iloc[:, :2].set_axis(["first", "second"], axis=1)
    empty = pairs.isna().any(axis=1)
    if empty.any():
        raise UserError(f"{path}: {shown(f'row {row}: an id is missing' for row in pairs.index[empty])}")
    return pairs[pairs["first"] != pairs["second"]].reset_index(drop=True)


def find_pictures(source: Path) -> dict[str, Path]:
    """The picture files of the data set in `source`, by id (the file's name without its extension)."""
    folder = Path(source) / PICTURES
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: the pictures are expected there, or in {folder / 'image'}")
    found: dict[str, Path] = {}
    for place in (folder, folder / "image"):
        if place.is_dir():
            for name in sorted(os.listdir(place)):
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS and not stem.startswith("."):
                    found.setdefault(stem, place / name)
    if not found:
        raise UserError(f"no picture in {folder} (looked for {', '.join(EXTENSIONS)}, also in {folder / 'image'})")
    return found


def read_sources(source: Path, external: Sequence[Path] = (), metadata: Path | None = None) -> pd.DataFrame:
    """The tables of the data sets in `source` and `external` in one, COLUMNS and three more.

    `source` names the set, `external` (bool) is False for the first, `file` is a Path, None where there is no picture.
    An id that an earlier set has too becomes ID@SET.
    """
    tables = []
    for folder in (source, *external):
        table = read_metadata(folder, None if tables else metadata)
        files = find_pictures(folder)
        name = os.path.basename(os.path.abspath(folder))
        name = f"{name}-{len(tables)}" if any(name == other["source"].iloc[0] for other in tables) else name
        table = table.assign(source=name, external=bool(tables), file=table["isic_id"].map(files.get).astype(object))
        if table["file"].isna().all():
            raise UserError(f"{folder}: no picture has one of the {len(table):,} ids of the table as its name")
        if table["patient_id"].isna().all():
            print(f"{folder}: no patient_id; groups come from lesions and duplicates alone", file=sys.stderr)
        known = {name for other in tables for name in other["isic_id"]}
        table["isic_id"] = table["isic_id"].where(
            ~table["isic_id"].isin(known), table["isic_id"] + "@" + table["source"]
        )
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def same_ids(table: pd.DataFrame) -> pd.DataFrame:
    """Pairs of ids (`first`, `second`; `kind`) that `read_sources` told apart although they are the same."""
    again = table.loc[table["isic_id"].str.contains("@"), "isic_id"]
    return pd.DataFrame({"first": again.str.split("@").str[0], "second": again}, dtype="str").assign(kind="same id")


def read_official(source: Path, path: Path | None = None) -> pd.DataFrame:
    """The official duplicate pairs (`first`, `second`; `kind`): by default the list that lies in `source`, if any."""
    path = path or Path(source) / DUPLICATES
    if not path.is_file() and path == Path(source) / DUPLICATES:
        return pd.DataFrame({"first": [], "second": [], "kind": []}, dtype="str")
    return read_duplicates(path).assign(kind="official")


def read_table(path: Path, target_required: bool = True) -> pd.DataFrame:
    """The table in the file `path` by the schema, COLUMNS only; without `target_required` its target may be NA."""
    raw = read_csv(path)
    table = raw.rename(columns={old: new for old, new in ALIASES.items() if new not in raw.columns})
    if "isic_id" not in table:
        raise UserError(f"{path}: no column isic_id (or image_name) among {', '.join(raw.columns)}")
    if not {"target", "benign_malignant"} & set(table.columns) and target_required:
        raise UserError(f"{path}: no column target (or benign_malignant) among {', '.join(raw.columns)}")
    if "target" in table:
        table["target"] = table["target"].replace({"0.0": "0", "1.0": "1"})
    _check(table, path)
    if "target" not in table:
        table["target"] = _from_words(table)
    for column in COLUMNS:
        if column not in table:
            table[column] = pd.Series(pd.NA, table.index, dtype="str")
    age = pd.to_numeric(table["age_approx"], errors="coerce")
    table["age_approx"] = age.where(age.between(0, 120)).astype(float)
    if target_required:
        table["target"] = table["target"].astype(int)
    return _without_repeats(table.loc[:, list(COLUMNS)], path).reset_index(drop=True)


def _from_words(table: pd.DataFrame) -> pd.Series:
    """The target that the column benign_malignant tells, "0" or "1"; NA where it says neither."""
    words = table.get("benign_malignant", pd.Series(pd.NA, table.index, dtype="str"))
    return words.str.lower().map({"benign": "0", "malignant": "1"}).astype("str")


def _check(table: pd.DataFrame, path: Path) -> None:
    """Raise UserError that names the values outside the schema by row and column."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using typeguard < 3")
        import pandera.pandas as pa  # a third of a second: only who reads a table waits for it

    columns = {"isic_id": pa.Column(str, pa.Check.str_matches(f"^{ID}$", error="not an id"), nullable=False)}
    if "target" in table:
        columns["target"] = pa.Column(str, pa.Check.isin(["0", "1"], error="not 0 or 1"), nullable=False)
    elif "benign_malignant" in table:
        word = pa.Check(lambda _: _from_words(table).notna(), error="neither benign nor malignant")
        columns["benign_malignant"] = pa.Column(str, word, nullable=False)
    if "patient_id" in table and table["patient_id"].notna().any():
        columns["patient_id"] = pa.Column(str, nullable=False)
    problems = []
    try:
        pa.DataFrameSchema(columns).validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        for case in error.failure_cases.sort_values("index", kind="stable").itertuples():
            what = "missing" if case.check == "not_nullable" else f"{case.failure_case!r} is {case.check}"
            problems.append(f"row {case.index}, column {case.column}: {what}")
    told = _from_words(table)
    contrary = table.index[told.notna() & (told != table["target"])] if "target" in table else []
    problems += [f"row {row}: target and benign_malignant contradict each other" for row in contrary]
    if problems:
        raise UserError(f"{path}: {shown(problems)}")


def _without_repeats(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """`table` with identical rows once; UserError where one id has two rows that differ."""
    table = table.drop_duplicates()
    repeated = table[table["isic_id"].duplicated(keep=False)]
    if len(repeated):
        problems = []
        for name, rows in repeated.groupby("isic_id", sort=False):
            columns = [column for column in table if rows[column].nunique(dropna=False) > 1]
            problems.append(f"rows {', '.join(map(str, rows.index))}: {name} differs in {', '.join(columns)}")
        raise UserError(f"{path}: one id, one row: {shown(problems)}")
    return table


def _join(table: pd.DataFrame, extra: pd.DataFrame, path: Path) -> pd.DataFrame:
    """`table` with its empty values filled from `extra`, by id."""
    filling = extra.set_index("isic_id").reindex(table["isic_id"]).set_axis(table.index)
    labels = pd.to_numeric(filling["target"], errors="coerce")
    contrary = table.loc[labels.notna() & (labels != table["target"]), "isic_id"]
    if len(contrary):
        raise UserError(f"{path}: another target than {TABLE} for {shown(contrary)}")
    for column in COLUMNS[1:-1]:
        table[column] = table[column].fillna(filling[column])
    known = table["patient_id"].notna()
    if known.any() and not known.all():
        raise UserError(f"{path}: no patient_id for {shown(table.loc[~known, 'isic_id'])}")
    return table


def read_csv(path: Path) -> pd.DataFrame:
    """A table of str (NA where empty), its index the row in the file; comma, semicolon or tab, with or without BOM."""
    try:
        if not path.is_file() and path.exists():  # a pipe or device would wait for ever
            raise UserError(f"{path} is a directory or a device: expected a table")
        if (size := path.stat().st_size) > BYTE_LIMIT:
            raise UserError(f"{path}: {size:,} bytes; a table of lesions has at most {BYTE_LIMIT:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: row {row} is not UTF-8 text; save the table as CSV in UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected a table with a header")
    if "\0" in text:
        raise UserError(
            f"{path}: row {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a NUL byte: not a CSV file"
        )
    header = text.splitlines()[0]
    separator = max(",;\t", key=header.count)
    try:
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    except csv.Error as error:
        raise UserError(f"{path}: the header is none: {error}") from None
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: the header names {repeated[0]!r} more than once")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header
            table = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                dtype="str",
                keep_default_na=False,
                na_values=MISSING,
                skip_blank_lines=False,
                skipinitialspace=True,
                index_col=False,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: not a table: {str(error).removeprefix('Error tokenizing data. C error: ')}") from None
    table.columns = [column.strip() for column in table.columns]
    table = table.apply(lambda column: column.str.strip())
    table.index += 2
    table = table.dropna(how="all")
    if table.empty:
        raise UserError(f"{path}: a header and no row")
    return table


def age_band(age: pd.Series) -> pd.Series:
    """Years in bands of 20, as text that sorts."""
    bands = pd.cut(age, [-1, 19, 39, 59, 79, 120], labels=["0-19", "20-39", "40-59", "60-79", "80+"])
    return bands.astype("str").fillna(UNKNOWN)


def shown(problems: Iterable[str]) -> str:
    """The first few problems in one line, and how many more there are."""
    problems = list(problems)
    more = f"; and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
