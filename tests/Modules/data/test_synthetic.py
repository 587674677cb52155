"""The synthetic data set: layout, determinism, duplicates, patients, and classes that overlap."""

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from Modules.cli import UserError
from Modules.data import synthetic
from Modules.data.synthetic import draw, patients, skin_tone, write_dataset

COLUMNS = [
    "isic_id",
    "patient_id",
    "lesion_id",
    "sex",
    "age_approx",
    "anatom_site_general_challenge",
    "diagnosis",
    "benign_malignant",
    "target",
]
SIZE, IMAGES = 64, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("datasets") / "demo", images=IMAGES, size=SIZE, seed=0)


@pytest.fixture(scope="module")
def metadata(folder):
    return pd.read_csv(folder / "train-metadata.csv")


@pytest.fixture(scope="module")
def many():
    """The metadata of a set large enough for its statistics to be steady; no pictures."""
    return patients(np.random.default_rng(0), 5000)[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_the_published_one(folder, metadata):
    pictures = sorted((folder / "train-image" / "image").iterdir())
    assert list(metadata.columns) == COLUMNS
    assert [path.name for path in pictures] == [f"{isic_id}.jpg" for isic_id in metadata.isic_id]
    assert metadata.isic_id.is_unique
    assert metadata.isic_id.str.fullmatch(r"ISIC_\d{7}").all()
    assert {cv2.imread(str(path)).shape for path in pictures} == {(SIZE, SIZE, 3)}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["demo"], "a temporary folder was left behind"


def test_values_are_consistent_and_both_classes_present(metadata):
    assert metadata.target.map({0: "benign", 1: "malignant"}).equals(metadata.benign_malignant)
    assert ((metadata.diagnosis == "melanoma") == (metadata.target == 1)).all()
    assert 0.2 < metadata.target.mean() < 0.4


def test_vocabulary_is_that_of_the_real_metadata(many, request):
    real = request.config.rootpath.parent / "shared" / "isic2020" / "full-train-metadata.csv"
    if not real.exists():
        pytest.skip("the real metadata is not beside this checkout")
    real = pd.read_csv(real)
    assert list(many.columns) == list(real.columns)
    for column in ("sex", "age_approx", "anatom_site_general_challenge", "diagnosis", "benign_malignant", "target"):
        assert set(many[column].dropna()) <= set(real[column]), column


def test_same_seed_same_bytes_other_seed_other_bytes(folder, tmp_path):
    again = contents(write_dataset(tmp_path / "again", images=IMAGES, size=SIZE, seed=0))
    other = contents(write_dataset(tmp_path / "other", images=IMAGES, size=SIZE, seed=1))
    assert again == contents(folder)
    assert not set(again.values()) & set(other.values())


def test_some_duplicates_are_listed_and_the_others_only_share_their_bytes(folder, metadata):
    pictures = {path.stem: path.read_bytes() for path in (folder / "train-image" / "image").iterdir()}
    same = {}
    for isic_id, jpeg in sorted(pictures.items()):
        same.setdefault(jpeg, []).append(isic_id)
    pairs = {tuple(ids) for ids in same.values() if len(ids) > 1}
    listed = pd.read_csv(folder / "ISIC_2020_Training_Duplicates.csv")
    assert list(listed.columns) == ["image_name_1", "image_name_2"]
    assert set(listed.itertuples(index=False, name=None)) < pairs
    assert len(listed) > 0
    rows = metadata.set_index("isic_id")
    for first, second in pairs:
        assert rows.loc[first].equals(rows.loc[second])


def test_patients_have_one_to_nine_images_and_some_both_classes(many):
    by_patient = many.groupby("patient_id")
    assert set(by_patient.size()) == set(range(1, 10))
    assert (by_patient.target.nunique() == 2).any()
    assert (by_patient.target.nunique() == 1).any()
    assert (by_patient[["sex", "age_approx"]].nunique() <= 1).all(axis=None), "a patient has one sex and age"


def test_some_metadata_is_missing(many):
    missing = many.isna().mean()
    optional = ["sex", "age_approx", "anatom_site_general_challenge"]
    assert missing[optional].between(0.001, 0.1).all()
    assert (missing.drop(optional) == 0).all()


def test_ids_and_order_tell_nothing_of_the_class(many):
    for order in (many.isic_id.str[-7:].astype(int), many.lesion_id.str[-7:].astype(int), many.index):
        assert 0.45 < roc_auc_score(many.target, order) < 0.55


@pytest.mark.parametrize("malignant", [False, True])
def test_lesion_lies_inside_the_picture_and_stands_out(malignant):
    for seed in range(20):
        image, mask = draw(np.random.default_rng(seed), malignant, SIZE)
        assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((SIZE, SIZE), bool)
        assert 0.005 < mask.mean() < 0.6
        assert mask[1:-1, 1:-1].sum() == mask.sum(), "the lesion touches the frame"
        wide, near = (cv2.dilate(mask.astype(np.uint8), np.ones((width, width))) > 0 for width in (11, 5))
        assert image[mask].mean() < image[wide & ~near].mean() - 5


def test_skin_is_the_patients():
    rng = np.random.default_rng(0)
    fair, _ = draw(np.random.default_rng(1), False, SIZE, skin=(0.1, 0.2))
    brown, _ = draw(np.random.default_rng(1), False, SIZE, skin=(0.9, 0.2))
    assert fair.mean() > brown.mean() + 30
    assert min(min(skin_tone(rng)) for _ in range(100)) > 0


def test_a_picture_does_not_depend_on_the_others(tmp_path, monkeypatch):
    """Each picture starts from a generator of its own, whatever the pictures before it took from theirs."""
    states = []

    def recorded(rng, *_):
        states.append(rng.random())
        rng.random(len(states))
        return np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool)

    monkeypatch.setattr(synthetic, "draw", recorded)
    write_dataset(tmp_path / "few", images=5, size=8)
    write_dataset(tmp_path / "more", images=20, size=8)
    assert states[:5] == states[5:10]
    assert len(set(states)) == 20


def test_classes_overlap_for_simple_features():
    """Colour statistics and a thumbnail find some of the difference: neither nothing to learn nor a giveaway."""
    target = np.arange(240) % 10 < 4
    images = [draw(np.random.default_rng([7, index]), bool(label), 48)[0] for index, label in enumerate(target)]
    features = [
        np.concatenate(
            [
                image.mean(axis=(0, 1)),
                image.std(axis=(0, 1)),
                np.percentile(image, [1, 5, 25, 50, 75, 95], axis=(0, 1)).ravel(),
                cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).ravel(),
            ]
        )
        for image in images
    ]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=1000))
    scores = cross_val_predict(model, features, target, cv=5, method="predict_proba")[:, 1]
    assert 0.65 < roc_auc_score(target, scores) < 0.95


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "demo", images=5, size=16)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_left_untouched(folder):
    before = contents(folder)
    assert write_dataset(folder, images=5, size=16, seed=9) == folder
    assert contents(folder) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than a data set"):
        write_dataset(tmp_path, images=5, size=16)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
