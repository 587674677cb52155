"""One Keras model and its training, used twice: for the embedding and for the classifier.

    network = NeuralNetwork(model, "embedding", folder, loss, adam(1e-3), monitor="val_loss", mode="min")
    history = network.fit(batches, steps, epochs=20, validate=lambda: {"val_loss": ...})

After each epoch, every SAVE_EVERY seconds within one, and at SIGINT and SIGTERM, one file, `state-<name>.npz`, holds
all that decides the future: weights, optimizer, the step within the epoch and its figures so far, the best epoch and
its weights, the last healthy weights and the history. `resume=True` goes on from it, as if nothing had happened. It is
written beside the training that goes on: the 270 MB of InceptionV3 take seconds.

A model that was made in the scope of a `tf.distribute` strategy is trained by it. Every worker then runs the same
`fit` and takes the same decisions; the chief alone has the file, and tells the others what it holds.
"""

import contextlib
import copy
import json
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from Modules import distribution, state
from Modules.cli import Stopped, UserError, stopping
from Modules.metric_learning.collapse import Diagnosis, Watch, no_watch

Validate = Callable[[], dict[str, float]]
Batches = Callable[[int], tf.data.Dataset]
Optimize = Callable[[float], tf.keras.optimizers.Optimizer]  # what multiplies the learning rate -> a new optimizer

WARM_UP = 0.05  # share of the steps in which the rate of the cosine schedule rises from 0
BACK_OFF = 0.1  # of the learning rate, each time a collapsed embedding is taken back to where it was healthy
RECOVERIES = 3  # then the recipe is at fault
SAVE_EVERY = 600  # seconds within an epoch
WRITER = ThreadPoolExecutor(1, "state")
# What the file of state keeps beside arrays. The first says whose it is.
FACTS = ("identity", "history", "step", "best_epoch", "healthy_epochs", "recoveries")


def adam(learning_rate: float, weight_decay: float = 0.0, schedule: str = "constant", steps: int = 0) -> Optimize:
    """Adam, with `weight_decay` AdamW (Loshchilov & Hutter, ICLR 2019), which spares biases and BatchNorm.

    `cosine`: warm-up, then half a cosine down to 0 at `steps`, those of the whole training (the same, ICLR 2017, §3).
    """

    def optimizer(factor: float) -> tf.keras.optimizers.Optimizer:
        rate, warm_up = factor * learning_rate, int(WARM_UP * steps)
        if schedule == "cosine":
            decay = max(1, steps - warm_up)
            rate = tf.keras.optimizers.schedules.CosineDecay(0.0, decay, warmup_target=rate, warmup_steps=warm_up)
        if not weight_decay:
            return tf.keras.optimizers.Adam(rate)
        adam_w = tf.keras.optimizers.AdamW(rate, weight_decay)
        adam_w.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return adam_w

    return optimizer


class NeuralNetwork:
    """A compiled model with its history, its best epoch and its file of state.

    `history` maps each quantity to one value an epoch, as Keras's does; validation's begin with `val_`.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        name: str,
        folder: Path,
        loss: Callable,
        optimize: Optimize,
        monitor: str = "val_loss",
        mode: str = "min",
        metrics: Callable[[], list[tf.keras.metrics.Metric]] = list,
        identity: dict | None = None,
    ):
        """`mode` says which epoch's weights are kept: the `min` or `max` of `monitor`, or the `last`; of those that the
        watch calls healthy, if there are any."""
        self.model, self.name, self.monitor, self.mode = model, name, monitor, mode
        self.file = Path(folder) / f"state-{name}.npz"
        self.identity = json.loads(json.dumps(identity or {}))  # as it will be read back
        self.history: dict[str, list[float]] = {}
        self.step = 0  # batches of the present epoch that are done
        self.sums: list[np.ndarray] = []  # the figures of those batches, as Keras's metrics keep them
        self.saved = time.monotonic()  # when the state was last saved
        self.writing: Future | None = None  # the file of state, on its way to the disk
        self.best_epoch = 0  # counted from 0; the first where no epoch had a finite monitored value
        self.healthy_epochs = 0  # how many there had been when the watch last found nothing
        self.recoveries: list[str] = []  # what was wrong each time
        self.weights = dict.fromkeys(("best", "healthy"), model.get_weights())
        self.diagnosis: Diagnosis | None = None  # what the watch last found wrong
        self.strategy = model.distribute_strategy

        def compile_model() -> None:
            with self.strategy.scope():
                # All variables are made here: TensorFlow traces a step that makes some twice.
                model.compile(optimize(BACK_OFF ** len(self.recoveries)), loss, metrics=metrics())
                model.optimizer.build(model.trainable_variables)

        self._compile = compile_model
        self._compile()

    @property
    def is_chief(self) -> bool:
        return distribution.is_chief(self.strategy)

    @property
    def epochs_done(self) -> int:
        return len(self.history.get(self.monitor, ()))

    def best_figures(self) -> dict[str, float]:
        """Validation's figures of the best epoch."""
        return {name: values[self.best_epoch] for name, values in self.history.items() if name.startswith("val_")}

    def epochs(self) -> list[dict[str, float]]:
        """The history as one record an epoch."""
        return [dict(zip(self.history, values, strict=True)) for values in zip(*self.history.values(), strict=True)]

    def fit(
        self,
        batches: Batches,
        steps: int,
        epochs: int,
        validate: Validate = dict,
        patience: int = 0,
        resume: bool = False,
        callbacks: tuple = (),
        watch: Watch = no_watch,
        recover: bool = False,
    ) -> dict[str, list[float]]:
        """Train to `epochs`, or until `patience` (0: never) epochs in a row were no better; end at the best weights.

        `batches(epoch)` is the endless stream that starts at `epoch`, `steps` batches an epoch, each in as many parts
        as this worker has replicas; `validate` returns the validation's figures. Keras `callbacks` see them among the
        epoch's logs. `watch` looks at all epochs so far: what it finds wrong is said once and, but for a mere lag, ends
        the training. With `recover` a collapse takes it back to the last healthy epoch instead, at a lower rate; the
        epochs since then are struck from the history.
        """
        here = len(distribution.share(self.strategy).parts)
        if resume and distribution.any_worker(self.strategy, self.is_chief and state.exists(self.file)):
            self.restore()
        self.diagnosis = watch.diagnose(self.epochs()) if self.epochs_done else None
        with stopping() as signals, contextlib.ExitStack() as ending:
            ending.callback(self.wait)
            while True:
                if recover and self.collapsed and len(self.recoveries) < RECOVERIES:
                    self.go_back(steps)
                if self.epochs_done >= epochs or self.finished(patience):
                    break
                start, done = self.epochs_done, self.step
                stream = batches(start).skip(done * here) if done else batches(start)
                self.model.fit(
                    distribution.dataset(self.strategy, stream),
                    initial_epoch=start,
                    epochs=start + 1 if done else epochs,  # Keras gives all epochs of a fit as many steps
                    steps_per_epoch=steps - done,
                    verbose=0,
                    callbacks=[_Epochs(self, epochs, steps, validate, patience, watch, signals), *callbacks],
                )
        if not math.isfinite(self.history[self.monitor][self.best_epoch]):
            raise UserError(
                f"{self.name}: no epoch had a finite {self.monitor}; lower the learning rate or enlarge the batch"
            )
        self.model.set_weights(self.weights["best"])
        return self.history

    def go_back(self, steps: int) -> None:
        """Take up the last healthy epoch again, at a lower learning rate."""
        self.recoveries.append(self.diagnosis.message)
        self.diagnosis = None
        self.history = {name: values[: self.healthy_epochs] for name, values in self.history.items()}
        if self.best_epoch >= self.healthy_epochs:
            self.best_epoch, self.weights["best"] = max(self.healthy_epochs - 1, 0), self.weights["healthy"]
        self.step, self.sums = 0, []
        self._compile()
        self.model.optimizer.iterations.assign(self.healthy_epochs * steps)
        self.model.set_weights(self.weights["healthy"])
        self.save()
        rate = f"{BACK_OFF ** len(self.recoveries):g} of the learning rate"
        tqdm.write(f"{self.name}: back to epoch {self.healthy_epochs}, at {rate}")

    @property
    def collapsed(self) -> bool:
        return self.diagnosis is not None and self.diagnosis.kind in ("collapse", "nan")

    def out_of_patience(self, patience: int) -> bool:
        return bool(patience) and self.epochs_done > 0 and self.epochs_done - 1 - self.best_epoch >= patience

    def finished(self, patience: int) -> bool:
        """Whether no epoch is to follow, however many were asked for."""
        return self.out_of_patience(patience) or (self.diagnosis is not None and self.diagnosis.kind != "lag")

    def record(self, logs: dict[str, float], watch: Watch = no_watch) -> None:
        """Append an epoch to the history, have it looked at, keep its weights if it is the best, save the state."""
        for key, value in logs.items():
            self.history.setdefault(key, []).append(float(value))
        self.step = 0
        epochs, latest, present = self.epochs(), self.epochs_done - 1, self.model.get_weights()
        healthy, best_is = (watch.healthy(epochs[: epoch + 1]) for epoch in (latest, self.best_epoch))
        better = self.mode == "last" or latest == 0 or self._better(epochs[latest], epochs[self.best_epoch])
        if healthy > best_is or (healthy == best_is and better):
            self.best_epoch, self.weights["best"] = latest, present
        self.diagnosis = watch.diagnose(epochs)
        if healthy:
            self.healthy_epochs, self.weights["healthy"] = latest + 1, present
        self.save(present)

    def _better(self, epoch: dict[str, float], than: dict[str, float]) -> bool:
        value, best = epoch[self.monitor], than[self.monitor]
        sign = 1 if self.mode == "min" else -1
        return math.isfinite(value) and not (math.isfinite(best) and sign * value >= sign * best)

    def save(self, present: list[np.ndarray] | None = None) -> None:
        """Begin to write the file of state; `present` are the model's weights, where they are at hand.

        Raises:
            UserError: the disk was full or failed, the time before.
        """
        self.wait()
        self.saved = time.monotonic()
        arrays = {  # read by every worker, because BatchNorm's statistics and the figures come from all of them
            "model": present or self.model.get_weights(),
            "optimizer": [variable.numpy() for variable in self.optimizer_variables()],
            "sums": [variable.numpy() for variable in self.metric_variables()] if self.step else [],
            **self.weights,
        }
        if self.is_chief:
            facts = copy.deepcopy({name: getattr(self, name) for name in FACTS})  # which will change meanwhile
            self.writing = WRITER.submit(state.write, self.file, facts, arrays)

    def wait(self) -> None:
        """Until the file of state is on disk.

        Raises:
            UserError: the disk is full or fails.
        """
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def restore(self) -> None:
        """Take up the saved state.

        Raises:
            UserError: the file is damaged, or of another run: every value of `identity` must be what it was.
        """
        facts, parts = distribution.from_chief(self.strategy, lambda: state.read(self.file))
        try:
            changed = [name for name, value in self.identity.items() if facts["identity"].get(name) != value]
            if changed:
                raise UserError(
                    f"{self.file} is of a run with another {', '.join(changed)}: resume with the same options"
                )
            for name in FACTS[1:]:
                setattr(self, name, facts[name])
            self._compile()
            self.sums = parts["sums"]
            self.model.set_weights(parts["model"])
            for variable, value in zip(self.optimizer_variables(), parts["optimizer"], strict=True):
                variable.assign(value)
            self.weights = {kind: parts[kind] for kind in self.weights}
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.file} can't be resumed ({error}); remove it to start anew") from error

    def optimizer_variables(self) -> list[tf.Variable]:
        """The optimizer's state; under float16 with the scale of the loss, which Keras leaves out."""
        scale = getattr(self.model.optimizer, "_loss_scale", None)
        return [*self.model.optimizer.variables, *([scale.current_loss_scale, scale.counter] if scale else [])]

    def metric_variables(self) -> list[tf.Variable]:
        """Where Keras sums up the figures of an epoch."""
        return [variable for metric in self.model.metrics for variable in metric.variables]

    def forget(self) -> None:
        """Remove the file of state: there is nothing to resume."""
        self.wait()
        if self.is_chief:
            state.forget(self.file)


class _Epochs(tf.keras.callbacks.Callback):
    """Between Keras's fit and the network: the progress bar, validation, the record, early stopping, signals."""

    def __init__(
        self,
        network: NeuralNetwork,
        epochs: int,
        steps: int,
        validate: Validate,
        patience: int,
        watch: Watch,
        signals: list[int],
    ):
        super().__init__()
        self._supports_tf_logs = True  # else Keras waits for each batch's figures, and a GPU then for the next batch
        self.watch, self.signals = watch, signals
        self.network, self.epochs, self.steps = network, epochs, steps
        self.validate, self.patience = validate, patience

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()
        title, done = f"{self.network.name} {epoch + 1}/{self.epochs}", self.network.step
        self.bar = tqdm(total=self.steps, initial=done, desc=title, unit="batch", leave=False, ncols=80, disable=None)
        self.former = self.network.sums if done else []

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 and self.former:  # not before: Keras makes its metrics at the first batch
            for variable, value in zip(self.network.metric_variables(), self.former, strict=True):
                variable.assign(variable.numpy() + value)  # what replicas sum up knows no assign_add
        self.network.step += 1
        if self.bar.update():  # it was drawn, which is often enough to look at the loss
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        if self.network.step == self.steps:
            return
        due = bool(self.signals) or time.monotonic() - self.network.saved > SAVE_EVERY
        if distribution.any_worker(self.network.strategy, due):
            self.network.save()
            self.stop_on_signal()

    def stop_on_signal(self):
        """A signal to one worker stops all of them."""
        if distribution.any_worker(self.network.strategy, bool(self.signals)):
            self.bar.close()
            done = f"{self.network.epochs_done} epochs and {self.network.step} batches"
            line = f"stopped after {done} of the {self.network.name}: the same command with --resume goes on"
            raise Stopped(self.signals[0] if self.signals else signal.SIGTERM, line)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()
        seconds = time.perf_counter() - self.begun
        if self.former:
            logs.update({name: float(value) for name, value in self.model.get_metrics_result().items()})
        figures = distribution.by_itself(self.validate)
        logs.update(distribution.mean(self.network.strategy, figures))
        known = self.network.diagnosis
        self.network.record(logs, self.watch)
        name, monitor = self.network.name, self.network.monitor
        best = " *" if self.network.best_epoch == epoch else ""
        figures = "  ".join(f"{key} {logs[key]:.4f}" for key in dict.fromkeys(("loss", monitor)))
        tqdm.write(f"{name} {epoch + 1}/{self.epochs}  {figures}  {seconds:.0f} s{best}")
        if self.network.diagnosis and (known is None or known.kind != self.network.diagnosis.kind):
            tqdm.write(f"{name}: {self.network.diagnosis.message}")
        self.model.stop_training = self.network.finished(self.patience)
        if self.network.out_of_patience(self.patience):
            tqdm.write(f"{name}: stopped, {self.patience} epochs without a better {monitor}")
        if self.model.stop_training or epoch + 1 == self.epochs:
            self.network.wait()  # no training is left to write it beside, and a signal meanwhile counts
        self.stop_on_signal()
