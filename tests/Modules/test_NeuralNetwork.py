"""Training: it learns, ends at the best epoch, stops when told to, and a cut changes nothing."""

import os
import signal
import threading

import numpy as np
import pytest
import tensorflow as tf

import modules
from dataset import vector_batches
from Modules import NeuralNetwork as NeuralNetwork_module
from Modules import runtime, state, tracking
from Modules.cli import Stopped, UserError
from Modules.config import Classifier
from Modules.metric_learning.collapse import Diagnosis, Watch
from Modules.NeuralNetwork import NeuralNetwork, adam

rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(64, 4)).astype(np.float32)
TARGETS = (VECTORS[:, 0] + VECTORS[:, 1] > 0).astype(np.float32)
BATCH = 16


class CutOffError(Exception):
    """The power fails."""


def network(folder, units=(8,), seed=0, dropout=0.0, **options):
    runtime.set_seeds(seed)
    model = modules.build_classifier(Classifier(units=units, dropout=dropout), 4)
    return NeuralNetwork(model, "classifier", folder, tf.keras.losses.BinaryCrossentropy(), adam(0.03), **options)


def stream(epoch):
    return vector_batches(VECTORS, TARGETS, BATCH, 0, epoch)[0]


def fit(net, epochs, validate, **options):
    return net.fit(stream, len(VECTORS) // BATCH, epochs, validate, **options)


class Script:
    """Validation that says `values` in turn and remembers the weights it saw; it fails before epoch `cut`."""

    def __init__(self, net, values, name="val_loss", cut=None):
        self.net, self.values, self.name, self.cut = net, values, name, cut
        self.seen = {}

    def __call__(self):
        epoch = self.net.epochs_done
        if epoch == self.cut:
            raise CutOffError
        self.seen[epoch] = self.net.model.get_weights()
        return {self.name: self.values[epoch]}


def assert_same(one, other):
    for value, wanted in zip(one, other, strict=True):
        np.testing.assert_array_equal(value, wanted)


# --- The optimizer ----------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_ends_at_0_along_a_cosine():
    optimizer, weight = adam(0.1, schedule="cosine", steps=105)(0.5), tf.Variable(0.0)

    def rate(step):
        optimizer.build([weight])
        optimizer.iterations.assign(step)
        optimizer.apply_gradients([(tf.zeros(()), weight)])
        return float(optimizer.learning_rate)

    expected = {0: 0.0, 1: 0.01, 5: 0.05, 55: 0.025, 105: 0.0}
    assert {step: rate(step) for step in expected} == pytest.approx(expected, abs=1e-7)


def test_weights_decay_but_for_biases_and_batch_norm():
    model = tf.keras.Sequential([tf.keras.layers.Dense(3), tf.keras.layers.BatchNormalization()])
    model.build((None, 2))
    model.set_weights([weight + 1 for weight in model.get_weights()])
    before = {variable.name: variable.numpy() for variable in model.trainable_variables}
    optimizer = adam(0.1, weight_decay=0.2)(1.0)
    optimizer.apply_gradients((tf.zeros_like(variable), variable) for variable in model.trainable_variables)
    for variable in model.trainable_variables:
        kept = 1 - 0.1 * 0.2 if "kernel" in variable.name else 1
        np.testing.assert_allclose(variable.numpy(), kept * before[variable.name], rtol=1e-6)


# --- Learning and the best epoch --------------------------------------------------------------------------------------


def test_it_learns_and_keeps_a_value_for_every_epoch(tmp_path):
    net = network(tmp_path, metrics=modules.classifier_metrics)
    history = fit(net, 15, lambda: {"val_loss": -float(net.epochs_done), "val_more": 1.0})
    assert set(history) == {"loss", "accuracy", "precision", "recall", "f1_score", "val_loss", "val_more"}
    assert {len(values) for values in history.values()} == {15}
    assert net.model.train_tf_function.experimental_get_tracing_count() == 1  # seconds each, of a large network
    assert history["loss"][-1] < history["loss"][0] / 2
    assert history["accuracy"][-1] > 0.9
    assert history["accuracy"][0] < history["accuracy"][-1]
    assert net.epochs()[3] == {name: values[3] for name, values in history.items()}
    assert net.best_epoch == 14


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [0.9, 0.3, 0.5, 0.4], 1),
        ("max", [0.1, 0.3, 0.9, 0.4], 2),
        ("min", [0.5, 0.2, 0.2, 0.2], 1),
        ("max", [0.5, 0.5, 0.1, 0.5], 0),
        ("min", [np.nan, 0.7, np.nan, 0.8], 1),
        ("max", [np.inf, 0.7, -np.inf, 0.8], 3),
        ("min", [np.nan] * 4, 0),
        ("last", [0.3, 0.9, 0.5], 2),
    ],
)
def test_the_best_epoch_is_the_first_with_the_best_finite_value(tmp_path, mode, values, best):
    net = network(tmp_path, monitor="val_score", mode=mode)
    for value in values:
        net.record({"loss": 0.0, "val_score": value})
    assert net.best_epoch == best


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 2)])
def test_it_ends_at_the_weights_of_the_best_epoch(tmp_path, mode, best):
    net = network(tmp_path, monitor="val_score", mode=mode)
    script = Script(net, [0.5, 0.2, 0.9, np.nan], "val_score")
    fit(net, 4, script)
    assert net.best_epoch == best
    assert_same(net.model.get_weights(), script.seen[best])
    assert not np.array_equal(script.seen[1][0], script.seen[2][0])


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([3, 2, 2, 2, 1, 0, 0], 2, 4),  # equal is not better
        ([3, 2, 4, 1, 4, 4, 4], 2, 6),
        ([1, 2, 3, 4, 5, 6, 7], 1, 2),
        ([1, 2, 3, 4, 5, 6, 7], 0, None),
        ([np.nan] * 7, 3, 4),
        ([7, 6, 5, 4, 3, 2, 1], 1, None),
    ],
)
def test_patience_is_out_after_so_many_epochs_without_a_better_one(tmp_path, values, patience, epochs):
    net = network(tmp_path)
    out = []
    for done, value in enumerate(values, start=1):
        net.record({"val_loss": value})
        if net.out_of_patience(patience):
            out.append(done)
    assert (out[0] if out else None) == epochs


def test_no_finite_epoch_is_the_users_to_mend(tmp_path):
    net = network(tmp_path)
    with pytest.raises(UserError, match=r"classifier: no epoch had a finite val_loss; lower the learning rate"):
        fit(net, 2, Script(net, [np.nan, np.inf]))


def test_the_best_figures_are_validations_of_the_best_epoch(tmp_path):
    net = network(tmp_path)
    for loss, val_loss, recall in ((3.0, 0.5, 0.1), (2.0, 0.2, 0.7), (1.0, 0.9, 0.8)):
        net.record({"loss": loss, "val_loss": val_loss, "val_recall": recall})
    assert net.best_figures() == {"val_loss": 0.2, "val_recall": 0.7}


def test_without_patience_it_stops(tmp_path, capsys):
    net = network(tmp_path)
    fit(net, 7, Script(net, [3, 2, 2, 4, 1, 0, 0]), patience=2)
    assert net.epochs_done == 4
    assert "stopped, 2 epochs without a better val_loss" in capsys.readouterr().out


def test_callbacks_see_what_validation_says(tmp_path):
    net, seen = network(tmp_path), []
    fit(
        net, 2, Script(net, [0.5, 0.25]),
        callbacks=(tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, logs))),),
    )  # fmt: skip
    assert [(epoch, logs["val_loss"]) for epoch, logs in seen] == [(0, 0.5), (1, 0.25)]
    assert [logs["loss"] for _, logs in seen] == net.history["loss"]


def test_no_batch_waits_for_the_figures_of_the_one_before(tmp_path):
    class Probe(tf.keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self._supports_tf_logs, self.fetched = True, []

        def on_train_batch_end(self, batch, logs=None):
            self.fetched.append(not tf.is_tensor(logs["loss"]))

    probe, (_, board) = Probe(), tracking.callbacks(None, "stage", tmp_path, False)
    fit(network(tmp_path), 1, lambda: {"val_loss": 0.0}, callbacks=(probe, board))
    assert probe.fetched == [False] * (len(VECTORS) // BATCH)


# --- The watch --------------------------------------------------------------------------------------------------------


def found_from(epoch, kind):
    def diagnose(epochs):
        return Diagnosis(kind, len(epochs), f"{kind} it is") if len(epochs) >= epoch else None

    return Watch(diagnose, lambda epochs: True)


def test_what_the_watch_finds_ends_it_and_is_said(tmp_path, capsys):
    net = network(tmp_path)
    fit(net, 5, Script(net, [5, 4, 3, 2, 1]), watch=found_from(3, "collapse"))
    assert net.epochs_done == 3
    assert net.diagnosis.kind == "collapse"
    assert "collapse it is" in capsys.readouterr().out


def test_a_lag_is_said_once_and_training_goes_on(tmp_path, capsys):
    net = network(tmp_path)
    fit(net, 5, Script(net, [5, 4, 3, 2, 1]), watch=found_from(2, "lag"))
    assert net.epochs_done == 5
    assert capsys.readouterr().out.count("lag it is") == 1


def watch_that_collapses(net, from_epoch, times):
    """Finds a collapse two epochs after the last healthy one, `times` times."""

    def diagnose(epochs):
        if len(epochs) == from_epoch + 2 and len(net.recoveries) < times:
            return Diagnosis("collapse", len(epochs), "collapse it is")
        return None

    return Watch(diagnose, lambda epochs: not (epochs[-1]["val_loss"] > 9 and len(net.recoveries) < times))


@pytest.mark.parametrize("times", [1, 3])
def test_a_collapse_is_taken_back_to_the_last_healthy_epoch_at_a_lower_rate(tmp_path, capsys, times):
    net = network(tmp_path)
    seen = {}

    def validate():
        epoch = net.epochs_done
        seen.setdefault((len(net.recoveries), epoch), net.model.get_weights())
        return {"val_loss": 10.0 if epoch >= 2 and len(net.recoveries) < times else 5.0 - epoch}

    rate = float(net.model.optimizer.learning_rate)
    steps = len(VECTORS) // BATCH
    fit(net, 5, validate, watch=watch_that_collapses(net, 2, times), recover=True)
    assert net.history["val_loss"] == [5.0, 4.0, 3.0, 2.0, 1.0]  # the collapsed epochs are struck out
    assert net.recoveries == ["collapse it is"] * times
    assert float(net.model.optimizer.learning_rate) == pytest.approx(rate * 0.1**times)
    assert net.model.optimizer.iterations == 5 * steps
    assert not np.array_equal(
        seen[0, 2][0], seen[times, 2][0]
    )  # the same epoch, from the same weights, at another rate
    assert "back to epoch 2, at 0.1 of the learning rate" in capsys.readouterr().out


def test_after_three_recoveries_a_collapse_ends_it(tmp_path):
    net = network(tmp_path)
    fit(net, 9, Script(net, [5, 4] + [10] * 9), watch=watch_that_collapses(net, 2, 99), recover=True)
    assert len(net.recoveries) == 3
    assert net.diagnosis.kind == "collapse"
    assert net.best_epoch == 1


def test_a_network_that_was_never_healthy_starts_again_from_its_first_weights(tmp_path):
    net = network(tmp_path)
    first = net.model.get_weights()
    begun = []
    watch = Watch(
        lambda epochs: Diagnosis("nan", len(epochs), "nan it is") if not net.recoveries else None,
        lambda epochs: bool(net.recoveries),
    )
    remember = tf.keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: begun.append(net.model.get_weights()))
    fit(net, 1, lambda: {"val_loss": 1.0}, watch=watch, recover=True, callbacks=(remember,))
    assert_same(begun[1], first)


@pytest.mark.parametrize(("mode", "value"), [("last", 10.0), ("last", float("nan")), ("min", 1.0)])
def test_of_a_training_that_collapsed_a_healthy_epoch_is_kept(tmp_path, mode, value):
    net = network(tmp_path, mode=mode)
    watch = Watch(
        lambda epochs: Diagnosis("collapse", 4, "collapse it is") if len(epochs) == 4 else None,
        lambda epochs: len(epochs) <= 2,
    )
    script = Script(net, [5, 4, value, value, 1])
    fit(net, 5, script, watch=watch)
    assert (net.epochs_done, net.best_epoch) == (4, 1)
    assert_same(net.model.get_weights(), script.seen[1])


def test_a_collapse_at_which_a_run_was_cut_off_is_taken_back_by_the_run_that_goes_on(tmp_path):
    def train(net, cut, **options):
        def validate():
            epoch = net.epochs_done
            if epoch == cut:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"val_loss": 10.0 if epoch >= 2 and not net.recoveries else 5.0 - epoch}

        fit(net, 5, validate, watch=watch_that_collapses(net, 2, 1), recover=True, **options)

    with pytest.raises(Stopped):
        train(network(tmp_path), cut=3)
    net = network(tmp_path)
    train(net, cut=None, resume=True)
    assert net.history["val_loss"] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert net.recoveries == ["collapse it is"]


def test_the_first_healthy_epoch_takes_the_place_of_better_ones_before_it(tmp_path):
    net = network(tmp_path)
    script = Script(net, [1, 2, 5, 6])
    fit(net, 4, script, watch=Watch(lambda epochs: None, lambda epochs: len(epochs) >= 3))
    assert net.best_epoch == 2
    assert_same(net.model.get_weights(), script.seen[2])


# --- Cut off and resumed ----------------------------------------------------------------------------------------------

VALUES = [0.9, 0.4, 0.6, 0.5, 0.3, 0.7]


def full_network(folder, seed=0):
    """With all that has a state of its own: dropout, metrics."""
    return network(folder, dropout=0.4, seed=seed, metrics=modules.classifier_metrics)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What was trained without a cut."""
    net = full_network(tmp_path_factory.mktemp("whole"))
    fit(net, 6, Script(net, VALUES))
    return net


def test_under_float16_the_scale_of_the_loss_is_taken_up_again(tmp_path):
    runtime.set_precision("float16")
    try:
        first, second = network(tmp_path), network(tmp_path, seed=1)
    finally:
        runtime.set_precision("float32")
    fit(first, 1, Script(first, VALUES))
    scale = first.model.optimizer._loss_scale
    assert scale.counter.numpy() == len(VECTORS) // BATCH
    scale.current_loss_scale.assign(1024.0)
    first.save()
    first.wait()
    second.restore()
    optimizers = ([variable.numpy() for variable in net.optimizer_variables()] for net in (first, second))
    assert_same(*optimizers)
    assert second.model.optimizer.loss_scale.numpy() == 1024


@pytest.mark.parametrize("cut", [1, 4])
def test_a_cut_changes_nothing(tmp_path, whole, cut):
    first = full_network(tmp_path)
    with pytest.raises(CutOffError):
        fit(first, 6, Script(first, VALUES, cut=cut))
    second = full_network(tmp_path, seed=1)  # another seed: nothing of a new start may show in what follows
    script = Script(second, VALUES)
    fit(second, 6, script, resume=True)
    assert list(script.seen) == list(range(cut, 6))
    assert second.history == whole.history
    assert second.best_epoch == 4
    assert_same(second.model.get_weights(), whole.model.get_weights())
    optimizers = ([variable.numpy() for variable in net.model.optimizer.variables] for net in (second, whole))
    assert_same(*optimizers)


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_a_cut_within_an_epoch_changes_nothing(tmp_path, whole, cut, monkeypatch):
    """After `cut` batches, of 4 an epoch; every one is saved."""
    monkeypatch.setattr(NeuralNetwork_module, "SAVE_EVERY", -1)
    first = full_network(tmp_path)
    batches = []

    def count(*_):
        batches.append(1)
        if len(batches) == cut:
            raise CutOffError

    with pytest.raises(CutOffError):
        fit(first, 6, Script(first, VALUES), callbacks=(tf.keras.callbacks.LambdaCallback(on_train_batch_end=count),))
    second = full_network(tmp_path, seed=1)
    fit(second, 6, Script(second, VALUES), resume=True)
    assert second.history == whole.history
    assert_same(second.model.get_weights(), whole.model.get_weights())
    optimizers = ([variable.numpy() for variable in net.model.optimizer.variables] for net in (second, whole))
    assert_same(*optimizers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [2, 4])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, whole, number, batch):
    net = full_network(tmp_path)
    batches = []

    def send(*_):
        batches.append(1)
        if len(batches) == batch:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"of the classifier: the same command with --resume goes on") as stop:
        fit(net, 6, Script(net, VALUES), callbacks=(tf.keras.callbacks.LambdaCallback(on_train_batch_begin=send),))
    assert stop.value.number == number
    assert (net.epochs_done, net.step) == ((0, 2) if batch == 2 else (1, 0))
    assert signal.getsignal(number) is before
    again = full_network(tmp_path, seed=1)
    fit(again, 6, Script(again, VALUES), resume=True)
    assert again.history == whole.history
    assert_same(again.model.get_weights(), whole.model.get_weights())


def test_the_second_signal_stops_at_once(tmp_path):
    net = network(tmp_path)

    def send(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    with pytest.raises(Stopped) as stop:
        fit(net, 6, Script(net, VALUES), callbacks=(tf.keras.callbacks.LambdaCallback(on_train_batch_begin=send),))
    assert stop.value.number == signal.SIGTERM
    assert not net.file.exists()


def test_a_cut_while_the_state_is_written_leaves_the_epoch_before(tmp_path, monkeypatch):
    net = network(tmp_path)
    fit(net, 2, Script(net, VALUES))
    before = net.file.read_bytes()

    def cut(stream, *_, **__):
        stream.write(b"half")
        raise CutOffError

    monkeypatch.setattr(np.lib.format, "write_array", cut)
    net.save()
    with pytest.raises(CutOffError):
        net.wait()
    assert net.file.read_bytes() == before


def test_training_goes_on_while_the_state_is_written(tmp_path, monkeypatch):
    net, write, second = network(tmp_path), state.write, threading.Event()

    def wait_and_write(*arguments):
        assert second.wait(60)
        write(*arguments)

    monkeypatch.setattr(state, "write", wait_and_write)
    begins = tf.keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: epoch == 1 and second.set())
    fit(net, 2, Script(net, VALUES), callbacks=(begins,))
    again = network(tmp_path, seed=1)
    again.restore()
    assert again.history == net.history


@pytest.mark.parametrize(("epochs", "done"), [(1, 1), (6, 2)])  # the next one would have been saved beside it
def test_a_state_that_cannot_be_written_ends_the_training(tmp_path, monkeypatch, epochs, done):
    def fail(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(state, "write", fail)
    net = network(tmp_path)
    with pytest.raises(UserError, match="the disk is full"):
        fit(net, epochs, Script(net, VALUES))
    assert net.epochs_done == done


def test_a_signal_while_the_last_state_is_written_stops(tmp_path, monkeypatch):
    def signal_and_write(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    write = state.write
    monkeypatch.setattr(state, "write", signal_and_write)
    net = network(tmp_path)
    with pytest.raises(Stopped, match="after 1 epochs"):
        fit(net, 1, Script(net, VALUES))
    assert net.file.exists()


def test_a_finished_run_resumed_trains_no_more(tmp_path):
    net = network(tmp_path)
    fit(net, 3, Script(net, VALUES))
    again = network(tmp_path, seed=1)
    fit(again, 3, Script(again, VALUES, cut=3), resume=True)
    assert_same(again.model.get_weights(), net.model.get_weights())


@pytest.mark.parametrize("ended", [{"patience": 2}, {"watch": found_from(4, "collapse")}])
def test_a_run_that_was_ended_stays_ended(tmp_path, ended):
    net = network(tmp_path)
    fit(net, 6, Script(net, VALUES), **ended)
    assert net.epochs_done == 4
    again = network(tmp_path, seed=1)
    fit(again, 6, Script(again, VALUES, cut=4), resume=True, **ended)
    assert again.history == net.history
    assert_same(again.model.get_weights(), net.model.get_weights())


def test_more_epochs_can_be_asked_for(tmp_path, whole):
    net = full_network(tmp_path)
    fit(net, 2, Script(net, VALUES))
    again = full_network(tmp_path, seed=1)
    fit(again, 6, Script(again, VALUES), resume=True)
    assert_same(again.model.get_weights(), whole.model.get_weights())


@pytest.mark.parametrize(("values", "apart"), [([2.0, 1.0], False), ([1.0, 2.0], True)])
def test_the_best_weights_are_written_apart_only_where_they_are_not_the_present_ones(tmp_path, values, apart):
    net = network(tmp_path)
    fit(net, 2, Script(net, values))
    with np.load(net.file) as saved:
        assert ("best-0" in saved) is apart
        assert "model-0" in saved


def test_without_resume_it_starts_anew(tmp_path):
    net = network(tmp_path)
    fit(net, 2, Script(net, VALUES))
    again = network(tmp_path)
    fit(again, 2, Script(again, VALUES))
    assert again.history == net.history


def test_resume_without_a_state_starts_at_the_beginning(tmp_path):
    net = network(tmp_path)
    fit(net, 2, Script(net, VALUES), resume=True)
    assert net.epochs_done == 2


def of_another_shape(folder):
    net = network(folder, units=(9,))
    fit(net, 1, Script(net, VALUES))


def no_state(folder):
    (folder / "state-classifier.npz").write_text("no state")


def empty(folder):
    (folder / "state-classifier.npz").touch()


def cut_short(folder):
    net = network(folder)
    fit(net, 1, Script(net, VALUES))
    net.file.write_bytes(net.file.read_bytes()[:-100])


@pytest.mark.parametrize("write", [of_another_shape, no_state, empty, cut_short])
def test_a_state_of_something_else_is_refused(tmp_path, write):
    write(tmp_path)
    net = network(tmp_path)
    with pytest.raises(UserError, match=r"state-classifier\.npz can't be resumed .*remove it to start anew"):
        fit(net, 2, Script(net, VALUES), resume=True)


IDENTITY = {"seed": 0, "recipe": {"margin": 0.4, "units": (8,)}, "fold": None}


def test_a_state_of_another_run_is_refused_by_what_differs(tmp_path):
    net = network(tmp_path, identity=IDENTITY)
    fit(net, 1, Script(net, VALUES))
    same = network(tmp_path, identity=IDENTITY)
    fit(same, 2, Script(same, VALUES), resume=True)
    assert same.epochs_done == 2
    for changes, named in (({"seed": 1}, "seed"), ({"recipe": {"margin": 0.5}, "fold": 2}, "recipe, fold")):
        other = network(tmp_path, identity=IDENTITY | changes)
        with pytest.raises(UserError, match=f"of a run with another {named}: resume with the same options"):
            fit(other, 2, Script(other, VALUES), resume=True)
