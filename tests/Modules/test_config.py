"""The published numbers of the recipes, and every field set from the command line's text."""

from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from Modules import config
from Modules.cli import Parser, UserError
from Modules.config import STAGES, add_options, demo, recipe_named, with_options, without_length

FIELDS = [(stage, item) for stage, kind in STAGES.items() for item in fields(kind)]
TYPES = {bool, int, float, str, tuple[int, ...]}


def option(stage, name):
    return f"--{'classifier-' if stage == 'classifier' else ''}{name.replace('_', '-')}"


def parsed(*arguments, recipe=None):
    parser = Parser(prog="train.py")
    add_options(parser)
    return with_options(recipe or recipe_named("lightweight"), vars(parser.parse_args(arguments)))


# --- Recipes ----------------------------------------------------------------------------------------------------------


def values(recipe, stage, *names):
    return tuple(getattr(getattr(recipe, stage), name) for name in names)


def test_lightweight_is_as_published():
    recipe = recipe_named("lightweight")
    assert values(recipe, "data", "image_size", "batch_size", "flips") == (256, 128, True)
    assert values(recipe, "embedding", "backbone", "embedding_size") == ("inception_v3", 128)
    assert values(recipe, "embedding", "loss", "margin", "distance") == ("tfa-semi-hard", 0.4, "L2")
    assert values(recipe, "embedding", "learning_rate", "epochs", "patience") == (1e-3, 20, 0)
    assert values(recipe, "embedding", "train_backbone", "input_scaling", "batches") == (True, "own", "shuffled")
    assert values(recipe, "classifier", "outputs", "epochs", "patience", "dropout") == (1, 50, 0, 0.0)
    assert len(recipe.classifier.units) == 3
    assert min(values(recipe, "data", "rotation", "brightness", "noise")) > 0


def test_full_is_lightweight_on_resnet():
    lightweight, full = asdict(recipe_named("lightweight")), asdict(recipe_named("full"))
    assert full["embedding"].pop("backbone") == "resnet50"
    lightweight["embedding"].pop("backbone")
    assert {**full, "name": "lightweight"} == lightweight


def test_margin_is_as_published():
    recipe = recipe_named("margin")
    assert values(recipe, "embedding", "backbone", "embedding_size", "dense_units") == ("resnet50", 512, ())
    assert values(recipe, "embedding", "loss", "margin", "distance") == ("triplet-margin", 1.0, "L2")
    assert values(recipe, "embedding", "epochs", "patience", "input_scaling") == (100, 5, "-1..1")
    assert values(recipe, "classifier", "units", "outputs", "leaky", "dropout") == ((256, 64), 2, True, 0.4)
    assert values(recipe, "classifier", "epochs", "patience") == (80, 5)
    assert recipe.data.noise == 0
    assert recipe.data.flips
    assert min(values(recipe, "data", "rotation", "brightness", "contrast", "saturation", "hue")) > 0


@pytest.mark.parametrize("name", config.RECIPES)
def test_a_recipe_carries_its_name_and_the_demo_only_makes_it_smaller(name):
    recipe = recipe_named(name)
    small = demo(recipe)
    assert recipe.name == small.name == name
    assert values(small, "data", "image_size", "batch_size") < values(recipe, "data", "image_size", "batch_size")
    assert small.embedding.epochs < recipe.embedding.epochs
    assert values(small, "embedding", "backbone", "loss", "margin") == values(
        recipe, "embedding", "backbone", "loss", "margin"
    )


def test_a_run_that_goes_on_may_change_its_length_alone():
    recipe = recipe_named("margin")
    longer = parsed("--epochs=7", "--patience=1", "--classifier-epochs=9", "--classifier-patience=2", recipe=recipe)
    assert without_length(longer) == without_length(recipe)
    for other in ("--margin=0.9", "--classifier-dropout=0.1", "--image-size=32"):
        assert without_length(parsed(other, recipe=recipe)) != without_length(recipe)


@pytest.mark.parametrize("scheduled", ["--schedule=cosine", "--final-margin=0.5", "--loss=semi-hard,batch-hard"])
def test_a_run_whose_epochs_follow_a_schedule_keeps_its_length(scheduled):
    recipe = parsed(scheduled, recipe=recipe_named("margin"))
    assert without_length(parsed("--epochs=7", recipe=recipe)) != without_length(recipe)
    assert without_length(parsed("--classifier-epochs=7", recipe=recipe)) == without_length(recipe)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="'margni': did you mean margin"):
        recipe_named("margni")


# --- Options ----------------------------------------------------------------------------------------------------------


def test_every_field_has_a_type_that_text_can_give():
    assert {item.type for _, item in FIELDS} <= TYPES


def test_every_field_has_one_option_of_its_own():
    parser = Parser(prog="train.py", add_help=False)
    add_options(parser)
    assert sorted(word for action in parser._actions for word in action.option_strings) == sorted(
        option(stage, item.name) for stage, item in FIELDS
    )


def test_nothing_changes_where_nothing_is_set():
    assert parsed(recipe=recipe_named("margin")) == recipe_named("margin")


@st.composite
def settings_of_fields(draw):
    stage, item = draw(st.sampled_from(FIELDS))
    least, most = config.LIMITS.get(item.name, (1 if item.type is int else 0, 10**6))
    most = min(most, 10**6)
    kinds = {
        bool: st.booleans(),
        int: st.integers(least, most),
        float: st.floats(least, most),
        str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
        tuple[int, ...]: st.lists(st.integers(1, 4096)).map(tuple),
    }
    values = st.sampled_from([item.type(word) for word in config.WORDS.get(item.name, ())])
    return stage, item.name, draw(values if item.name in config.WORDS else kinds[item.type])


@settings(deadline=None)
@given(settings_of_fields())
def test_a_field_set_from_text_is_that_value_and_no_other_field_moves(setting):
    stage, name, value = setting
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else text
    expected = asdict(recipe_named("margin"))
    expected[stage][name] = value
    result = asdict(parsed(f"{option(stage, name)}={text}", recipe=recipe_named("margin")))
    assert result == expected
    assert type(result[stage][name]) is type(value)


WRONG = {
    bool: ["yes", "1", "True", ""],
    int: ["many", "1.5", "", "-1", "1e3"],
    float: ["much", "", "nan", "inf", "-0.1", "0,5"],
    tuple[int, ...]: ["a,b", "1.5", "64,0", "64,-1", "64;32"],
}


@pytest.mark.parametrize(
    ("stage", "name", "text"),
    [(stage, item.name, text) for stage, item in FIELDS for text in WRONG.get(item.type, ())]
    + [("data", "image_size", "0"), ("data", "batch_size", "0"), ("embedding", "epochs", "0")]
    + [(stage, item.name, "sideways") for stage, item in FIELDS if item.name in config.WORDS]
    + [
        ("embedding", "averaged_views", "3"),
        ("classifier", "outputs", "3"),
        ("classifier", "dropout", "1"),
        ("data", "zoom", "1"),
    ],
)
def test_a_wrong_value_names_its_option_and_what_was_expected(stage, name, text):
    with pytest.raises(UserError, match=f"^{option(stage, name)} {text!r}: expected "):
        parsed(f"{option(stage, name)}={text}")
