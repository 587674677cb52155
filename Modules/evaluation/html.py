"""The report of a run, `report.html`, one file that asks for nothing, and its summary `MODEL_CARD.md`.

Both are written from the facts (best_epoch.json), the figures beside them and what later evaluations left in
`evaluations/`, so that whoever has the checkpoint can write them again.
"""

import base64
import io
import json
from pathlib import Path

import cv2
import jinja2
from PIL import Image

from Modules.cli import UserError
from Modules.data.images import ImageError, read_image
from Modules.data.manifest import LABELS, read_manifest
from Modules.evaluation import tables

TEMPLATES = Path(__file__).with_name("templates")
REPORT, CARD, LATER = "report.html", "MODEL_CARD.md", "evaluations"
THUMBNAIL = 160  # pixels
PER = 1000  # lesions that the natural frequencies speak of
SCORER = {"baseline": "logistic", "baseline_finetune": "finetune"}  # their names in cross_validation
PHOTOGRAPHS = ("inputs",)  # figures that show pictures of the data


def write_report(folder: Path, facts: dict, pictures: bool) -> None:
    """Write REPORT and CARD of the checkpoint in `folder` from its `facts`; without `pictures` no image of the data.

    Raises:
        UserError: `folder` can't be written to.
    """
    figures = sorted((folder / "figures").glob("*.png"))
    content = {
        "facts": facts,
        "tables": tables,
        "labels": LABELS,
        "percent": tables.percent,
        "frequencies": frequencies(facts),
        "verdict": verdict(facts),
        "errors": errors(facts, pictures),
        "pictures": pictures,
        "figures": {file.stem: embedded(file) for file in figures if pictures or file.stem not in PHOTOGRAPHS},
        **{kind: later(folder, kind, facts) for kind in ("external", "comparison")},
        "cross_validation": pooled(folder, facts),
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=lambda name: name == f"{REPORT}.j2", undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    try:
        for name in (REPORT, CARD):
            text = environment.get_template(f"{name}.j2").render(content)
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)
    except OSError as error:
        raise UserError(f"can't write the report into {folder} ({error.strerror})") from None


def frequencies(facts: dict) -> dict | None:
    """Of PER lesions at the stated prevalence, by the whole test split: `melanomas`, `found`, `missed`, `alarms`
    (benign, called malignant), `cleared`; None where a rate is undefined."""
    result, prevalence = facts["test_full"], facts["prevalence"]
    if result["recall"] is None or result["specificity"] is None:
        return None
    melanomas = PER * prevalence
    found, cleared = melanomas * result["recall"], (PER - melanomas) * result["specificity"]
    counts = {
        "melanomas": melanomas, "found": found, "missed": melanomas - found,
        "alarms": PER - melanomas - cleared, "cleared": cleared,
    }  # fmt: skip
    return {name: f"{count:.0f}" if count >= 100 else f"{count:.1f}" for name, count in counts.items()}


def verdict(facts: dict) -> list[str]:
    """What the numbers do and do not show, in sentences."""
    said = []
    ours = facts["test"]
    for key, title in tables.BASELINES.items():
        theirs, gain = (facts.get(key) or {}).get("test"), facts["difference"]["test"].get(SCORER[key])
        if not theirs or not gain or not gain["roc_auc"]["ci95"]:
            continue
        low, high = gain["roc_auc"]["ci95"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "neither surely better nor worse than"
        gap = f"ROC AUC {ours['roc_auc']:.3f} against {theirs['roc_auc']:.3f}, difference [{low:+.3f}, {high:+.3f}]"
        said.append(f"It ranks {word} the plain classifier ({title}) on the same images: {gap}.")
    for key in ("lesion_covered", "rim_alone"):
        view = facts["shortcuts"]["views"][key]
        bounds = view["roc_auc_ci95"]
        if bounds and bounds[0] > 0.5:
            said.append(
                f"With the {tables.SHORTCUTS[key]} it still ranks above chance (ROC AUC {view['roc_auc']:.3f}): "
                "part of what it knows is not in the lesion."
                if key == "lesion_covered"
                else f"From the {tables.SHORTCUTS[key]} it still ranks above chance (ROC AUC {view['roc_auc']:.3f})."
            )
    if facts.get("diagnosis"):
        said.append(f"What the collapse watch said of training: {facts['diagnosis']}")
    return said


def errors(facts: dict, pictures: bool) -> list[dict]:
    """The worst errors, each image with `picture`, a data URI, where the data are there and may be shown."""
    files = _files(Path(facts["data"])) if pictures else {}

    def with_picture(row: dict) -> dict:
        return row | {"picture": thumbnail(files.get(row["isic_id"]))}

    return [
        with_picture(row) | {"neighbours": [with_picture(known) for known in row["neighbours"]]}
        for row in facts["errors"]
    ]


def _files(folder: Path) -> dict[str, Path]:
    try:
        manifest = read_manifest(folder).dropna(subset="path")
    except UserError:  # the data set is no longer there
        return {}
    return {name: folder / path for name, path in zip(manifest["isic_id"], manifest["path"], strict=True)}


def thumbnail(file: Path | None) -> str | None:
    """A small JPEG of a picture as a data URI, None where it can't be read."""
    if file is None:
        return None
    try:
        pixels = read_image(file, THUMBNAIL)
    except ImageError:
        return None
    data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return _uri("jpeg", data)


def embedded(file: Path) -> str:
    """A figure as a data URI of at most 256 colours, a third of its size; photographs as JPEG."""
    image = Image.open(file).convert("RGB")
    buffer = io.BytesIO()
    if file.stem in PHOTOGRAPHS:
        image.save(buffer, "JPEG", quality=85)
        return _uri("jpeg", buffer.getvalue())
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return _uri("png", buffer.getvalue())


def later(folder: Path, kind: str, facts: dict) -> list[dict]:
    """What predict.py left beside the checkpoint, by name, but for what it measured of a former one: of `--data`
    ("external"), of `--compare` ("comparison"), of the test split once more ("test")."""
    found = (_read(file) for file in sorted((folder / LATER).glob(f"{kind}-*.json")))
    return [content for content in found if content and content.get("sha256") == facts["sha256"]]


def pooled(folder: Path, facts: dict) -> dict | None:
    """What all folds reached together, where the checkpoint is one of them; their folders lie beside one another."""
    content = _read(folder.parent / "cross_validation.json") or {}
    return content if facts["sha256"] in content.get("models", ()) else None


def _read(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
