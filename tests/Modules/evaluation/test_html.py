"""The report: one file that asks for nothing, holds every number, and shows pictures only where it may."""

import base64
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest

from Modules.cli import UserError
from Modules.evaluation import figures, html, report, tables
from Modules.evaluation.calibration import calibrate
from Modules.evaluation.comparison import compare
from Modules.evaluation.decision_curve import decision_curve
from Modules.evaluation.metrics import evaluate
from Modules.evaluation.subgroups import subgroups

FETCHING = {"src", "srcset", "poster", "data", "action", "background", "formaction"}


class Page(HTMLParser):
    """What a page would fetch, its headings, its text, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.fetched, self.links, self.ids, self.open, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in FETCHING or (name == "href" and tag != "a"):
                self.fetched.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "fold-1"
    for name in ("inputs", "confusion_matrix"):
        figures.save(figures.confusion_matrix([[3, 1], [0, 4]], name), folder / "figures" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def facts():
    rng = np.random.default_rng(0)
    n = 120
    target = np.arange(n) % 2
    probability = np.clip(0.3 * target + 0.7 * rng.random(n), 0, 1)
    codes = np.arange(n) // 2
    result = evaluate(target, probability, 0.5, codes, resamples=50)
    quality = dict.fromkeys(tables.EMBEDDING, 0.5) | {"collapsed": False, "silhouette": None}
    calibration = calibrate(np.log(probability + 0.01), target, codes)
    table = pd.DataFrame({"target": target, "patient_id": codes.astype(str), "group": codes})
    rows = subgroups(table, probability, 0.5, {"sex": pd.Series(["<b>male</b>", "a|b", "x"] * 40)})
    known = {"isic_id": "ISIC_2", "target": 0, "cosine": 0.9}
    view = {"roc_auc": 0.8, "roc_auc_ci95": [0.7, 0.9], "undefined": {}}
    facts = {
        "config": {"name": "lightweight", "data": {"image_size": 64}, "embedding": {
            "backbone": "mobilenet", "embedding_size": 8, "loss": "semi-hard", "dense_units": (256, 3)}},
        "data": "nowhere", "fold": None, "full_dataset": False, "manifest_sha256": "ab" * 32, "seed": 0,
        "deterministic": False, "weights": "none", "precision": "float32", "command": "python train.py --data 'a b'",
        "versions": {"tensorflow": "2.15.1"}, "seconds": {"embedding": 60.0}, "diagnosis": None,
        "threshold": 0.5, "threshold_rule": "half", "prevalence": 0.0176,
        "used": {"splits": {"train": {"images": 10, "malignant": 5, "patients": 9}}},
        "test": result | {"embedding": quality}, "test_full": result | {"embedding": quality},
        "baseline": {"test": result}, "baseline_finetune": None, "sha256": {"best_epoch.keras": "cd" * 32},
        "difference": {"test": {"logistic": {"roc_auc": {"estimate": 0.02, "ci95": [-0.02, 0.06]}}}},
        "calibration": calibration | {
            "prevalence": 0.0176, "prior_offset": -4.0, "test": calibration["validation"],
            "at_prevalence": calibration["validation"]},
        "decision_curves": {"own": decision_curve(target, probability, 0.5, codes)},
        "subgroups": rows, "errors": [{"isic_id": "ISIC_1", "target": 1, "probability": 0.1, "neighbours": [known]}],
        "shortcuts": {"n": n, "lesion_found": 100, "strata": rows, "views": dict.fromkeys(tables.SHORTCUTS, view)},
    }  # fmt: skip
    return json.loads(json.dumps(facts))


def written(folder, facts, pictures=True):
    html.write_report(folder, facts, pictures)
    return Page((folder / html.REPORT).read_text(encoding="utf-8")), (folder / html.CARD).read_text(encoding="utf-8")


def test_nothing_is_fetched_and_every_tag_is_closed(folder, facts):
    page, _ = written(folder, facts)
    assert page.open == []
    assert page.fetched
    assert all(value.startswith("data:image/") for value in page.fetched)
    text = (folder / html.REPORT).read_text()
    assert not re.search(r"https?:|@import|url\(|<script", text)
    assert "default-src 'none'" in text
    assert sorted(path.name for path in folder.iterdir()) == ["MODEL_CARD.md", "figures", "report.html"]


def test_every_link_leads_somewhere_on_the_page(folder, facts):
    page, _ = written(folder, facts)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.links) == 10


def test_the_numbers_are_those_of_the_facts(folder, facts):
    page, card = written(folder, facts)
    for name in tables.METRICS:
        assert f"{facts['test'][name]:.3f}" in page.text
        assert f"{facts['test'][name]:.3f}" in card
    low, high = facts["test"]["roc_auc_ci95"]
    for text in (page.text, card):
        assert f"{low:.3f}\u2013{high:.3f}" in text
        assert facts["manifest_sha256"] in text
        assert facts["command"] in text
        assert "no medical device" in text
        assert "None" not in text
        assert "nan" not in text.split()


def test_words_from_outside_are_escaped(folder, facts):
    page, card = written(folder, facts)
    assert "sex: <b>male</b>" in page.text
    assert "sex: a/b" in card
    widths = {line.count("|") for line in card.splitlines() if line.startswith("| sex:")}
    assert len(widths) == 1


def test_pictures_of_the_data_can_be_left_out(folder, facts):
    with_pictures, _ = written(folder, facts)
    without, _ = written(folder, facts, pictures=False)
    assert len(with_pictures.fetched) == 2
    assert len(without.fetched) == 1
    assert "CC BY-NC 4.0" in without.text
    assert "ISIC_1" in without.text.replace("\u200b", "")


def test_the_worst_errors_show_their_pictures_where_the_data_are(folder, facts, monkeypatch):
    file = folder / "lesion.png"
    cv2.imwrite(str(file), np.full((300, 200, 3), 90, np.uint8))
    monkeypatch.setattr(html, "_files", lambda data: {"ISIC_1": file, "ISIC_2": folder / "gone.png"})
    page, _ = written(folder, facts)
    assert len(page.fetched) == 3
    (picture,) = (value for value in page.fetched if len(value) < 3000)
    data = np.frombuffer(base64.b64decode(picture.split(",")[1]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (html.THUMBNAIL, html.THUMBNAIL, 3)
    assert "no picture" in page.text


def test_natural_frequencies_add_up(facts):
    counts = {name: float(count) for name, count in html.frequencies(facts).items()}
    assert counts["melanomas"] == pytest.approx(17.6)
    assert counts["found"] + counts["missed"] == pytest.approx(17.6, abs=0.11)
    assert sum(counts[name] for name in ("found", "missed", "alarms", "cleared")) == pytest.approx(1000, abs=1.1)
    assert counts["found"] == pytest.approx(17.6 * facts["test_full"]["recall"], abs=0.06)
    one_class = facts | {"test_full": evaluate([0, 0], [0.1, 0.2], resamples=2)}
    assert html.frequencies(one_class) is None


def test_the_verdict_admits_what_is_not_shown(facts):
    for interval, said in (
        ([0.01, 0.08], "ranks better than"),  # the paired difference decides, not whether two intervals overlap
        ([-0.02, 0.06], "neither surely better nor worse"),
        ([-0.08, -0.01], "ranks worse than"),
    ):
        gain = {"test": {"logistic": {"roc_auc": {"estimate": 0.0, "ci95": interval}}}}
        sentences = " ".join(html.verdict(facts | {"difference": gain}))
        assert said in sentences
        assert f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" in sentences
    none = {"test": {"logistic": {"roc_auc": {"estimate": None, "ci95": None}}}}
    assert "plain classifier" not in " ".join(html.verdict(facts | {"difference": none}))
    assert "lesion covered" in " ".join(html.verdict(facts))
    assert "collapsed" in " ".join(html.verdict(facts | {"diagnosis": "the embedding collapsed"}))


def test_one_class_in_test_gives_a_report_with_reasons(folder, facts):
    alone = evaluate([1, 1, 1], [0.2, 0.7, 0.9], resamples=5) | {"embedding": facts["test"]["embedding"]}
    page, card = written(folder, facts | {"test": alone, "test_full": alone, "difference": {"test": {}}})
    assert "undefined: no benign image" in page.text
    assert "undefined: no benign image" in card


def test_later_evaluations_and_folds_are_shown(folder, facts):
    rng = np.random.default_rng(0)
    target = np.arange(60) % 2
    one, other = rng.random(60), rng.random(60)
    (folder / html.LATER).mkdir()
    external = {
        "name": "clinic", "notes": ["no patients are known"], "result": evaluate(target, one, resamples=20),
        "calibration": None, "subgroups": [],
        "differences": [{"what": "share malignant", "here": 0.5, "training": 0.02}],
    }  # fmt: skip
    comparison = {"path": "other.keras", "images": "the test split", "name": "other"}
    comparison["views"] = {"test_full": compare(target, one, other, (0.5, 0.5), np.arange(60))}
    mine = {"sha256": facts["sha256"]}
    former = {"sha256": {"best_epoch.keras": "ef" * 32}, "name": "of a former model"}
    report.write_json(folder / html.LATER / "external-clinic.json", external | mine)
    report.write_json(folder / html.LATER / "external-former.json", external | former)
    report.write_json(folder / html.LATER / "comparison-other.json", comparison | mine)
    pooled = {name: evaluate(target, scores, resamples=20) for name, scores in (("probability", one), ("knn", other))}
    gain = {"roc_auc": {"estimate": 0.777, "ci95": [0.7, 0.8]}, "accuracy": {"estimate": -0.1, "ci95": None}}
    folds = {"images": 60, "test_full": pooled, "difference": {"test_full": {"knn": gain}}}
    (folder / html.LATER / "external-damaged.json").write_text("{")
    report.write_json(folder.parent / "cross_validation.json", folds | {"models": [former["sha256"]]})
    assert "+0.777" not in written(folder, facts)[0].text  # of other models
    report.write_json(folder.parent / "cross_validation.json", folds | {"models": [former["sha256"], facts["sha256"]]})
    page, card = written(folder, facts)
    for words in ("clinic", "no patients are known", "other.keras", "DeLong", "McNemar", "its neighbours", "+0.777"):
        assert words in page.text
    assert "clinic" in card
    assert "of a former model" not in page.text + card


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(folder, facts):
    (folder / f"{html.REPORT}.partial").mkdir()
    with pytest.raises(UserError, match="can't write the report"):
        html.write_report(folder, facts, True)
