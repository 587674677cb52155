"""The table that predict.py and the page give: one row for every picture, the unreadable ones too."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from Modules.cli import UserError
from Modules.data.images import ImageError
from Modules.evaluation.evidence import Evidence

# Empty where a row has no such value: `probability` and `probability_at_prevalence` where not `in_distribution`.
COLUMNS = (
    "path",
    "probability",
    "probability_at_prevalence",
    "prediction",
    "threshold",
    "in_distribution",
    "malignant_share",
    "neighbours",
    "error",
)
DIGITS = 6


def row(path: str | Path, found: Evidence | ImageError, threshold: float) -> dict:
    """What is known about one picture: COLUMNS, with None where there is nothing, and `neighbours` as a list."""
    known = dict.fromkeys(COLUMNS) | {"path": str(path), "neighbours": []}
    if isinstance(found, ImageError):
        return known | {"error": str(found).removeprefix(f"{path}: ")}
    return known | {
        "probability": _rounded(found.probability),
        "probability_at_prevalence": _rounded(found.at_prevalence),
        "prediction": found.prediction,
        "threshold": threshold,
        "in_distribution": found.in_distribution,
        "malignant_share": round(found.malignant_share, DIGITS),
        "neighbours": [
            {
                "id": neighbour.id,
                "label": neighbour.label,
                "diagnosis": neighbour.diagnosis or None,
                "similarity": round(neighbour.similarity, DIGITS),
            }
            for neighbour in found.neighbours
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def flat(values: dict) -> dict:
    """A row as a CSV holds it: `neighbours` as words `id:label:similarity`, numbers with DIGITS places."""
    words = (f"{one['id']}:{one['label']}:{one['similarity']:.3f}" for one in values["neighbours"])
    return {
        name: f"{value:.{DIGITS}f}" if name.startswith("probability") and value is not None else value
        for name, value in values.items()
    } | {"neighbours": " ".join(words)}


def write_csv(stream: IO[str], rows: Iterable[dict]) -> Iterator[dict]:
    """Write `rows` one by one and pass each on once it is written."""
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for values in rows:
        writer.writerow(flat(values))
        yield values


def write_json_lines(stream: IO[str], rows: Iterable[dict]) -> Iterator[dict]:
    """As `write_csv`, one JSON object a line."""
    for values in rows:
        stream.write(json.dumps(values, allow_nan=False) + "\n")
        yield values


FORMATS = {".csv": write_csv, ".jsonl": write_json_lines, ".ndjson": write_json_lines}


@contextmanager
def written(rows: Iterable[dict], output: Path) -> Iterator[Iterator[dict]]:
    """`rows`, written to `output`, by its suffix one of FORMATS, while they are read. It appears when complete.

    Raises:
        UserError: it can't be written.
    """
    write = FORMATS[output.suffix.lower()]
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        # A name that is no text (on Linux it may be any bytes) is written as it is.
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            yield write(stream, rows)
        partial.replace(output)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename not in (None, str(partial), str(output)):
            raise
        raise UserError(f"can't write {output} ({error.strerror}): choose another file with --output") from None
    finally:
        partial.unlink(missing_ok=True)
