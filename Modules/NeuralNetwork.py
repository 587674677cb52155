"""One Keras model and its training, used twice: for the embedding and for the classifier.

    network = NeuralNetwork(model, "embedding", folder, loss, learning_rate=1e-3, monitor="val_loss", mode="min")
    history = network.fit(batches, steps, epochs=20, validate=lambda: {"val_loss": ...})

After each epoch one file, `state-<name>.npz`, holds all that decides the future: weights, optimizer, the best epoch's
weights and the history, from which the epoch, the best value and the patience follow. It replaces its predecessor
in one step, so a crash leaves the former epoch's. `resume=True` goes on from it.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from Modules.cli import UserError
from Modules.metric_learning.collapse import Diagnosis

Validate = Callable[[], dict[str, float]]
Watch = Callable[[list[dict[str, float]]], Diagnosis | None]
Batches = Callable[[int], tf.data.Dataset]


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
        learning_rate: float,
        monitor: str = "val_loss",
        mode: str = "min",
        metrics: tuple = (),
        identity: dict | None = None,
    ):
        self.model, self.name, self.monitor, self.mode = model, name, monitor, mode
        self.file = Path(folder) / f"state-{name}.npz"
        self.identity = json.loads(json.dumps(identity or {}))  # as it will be read back
        self.history: dict[str, list[float]] = {}
        self.best_weights: list[np.ndarray] = []
        self.diagnosis: Diagnosis | None = None  # what the watch last found wrong
        model.compile(tf.keras.optimizers.Adam(learning_rate), loss, metrics=list(metrics))

    @property
    def epochs_done(self) -> int:
        return len(self.history.get(self.monitor, ()))

    @property
    def best_epoch(self) -> int:
        """The epoch, from 0, with the best finite monitored value; the first where none is finite."""
        sign = 1 if self.mode == "min" else -1
        values = [sign * value if math.isfinite(value) else math.inf for value in self.history[self.monitor]]
        return values.index(min(values))

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
        validate: Validate,
        patience: int = 0,
        resume: bool = False,
        callbacks: tuple = (),
        watch: Watch = lambda epochs: None,
    ) -> dict[str, list[float]]:
        """Train to `epochs`, or until `patience` (0: never) epochs in a row were no better; end at the best weights.

        `batches(epoch)` is the endless stream that starts at `epoch`, `steps` batches an epoch; `validate` returns the
        validation's figures. Keras `callbacks` see them among the epoch's logs. `watch` looks at all epochs so far:
        what it finds wrong is said once and, but for a mere lag, ends the training.
        """
        if resume and self.file.exists():
            self.restore()
        start = self.epochs_done
        self.diagnosis = watch(self.epochs()) if start else None
        if start < epochs and not self.finished(patience):
            self.model.fit(
                batches(start),
                initial_epoch=start,
                epochs=epochs,
                steps_per_epoch=steps,
                verbose=0,
                callbacks=[_Epochs(self, epochs, steps, validate, patience, watch), *callbacks],
            )
        if not math.isfinite(self.history[self.monitor][self.best_epoch]):
            raise UserError(
                f"{self.name}: no epoch had a finite {self.monitor}; lower the learning rate or enlarge the batch"
            )
        self.model.set_weights(self.best_weights)
        return self.history

    def out_of_patience(self, patience: int) -> bool:
        return bool(patience) and self.epochs_done > 0 and self.epochs_done - 1 - self.best_epoch >= patience

    def finished(self, patience: int) -> bool:
        """Whether no epoch is to follow, however many were asked for."""
        return self.out_of_patience(patience) or (self.diagnosis is not None and self.diagnosis.kind != "lag")

    def record(self, logs: dict[str, float]) -> None:
        """Append an epoch to the history, keep its weights if it is the best so far, and save the state."""
        for key, value in logs.items():
            self.history.setdefault(key, []).append(float(value))
        if self.best_epoch == self.epochs_done - 1:
            self.best_weights = self.model.get_weights()
        self.save()

    def save(self) -> None:
        arrays = {f"model_{i}": value for i, value in enumerate(self.model.get_weights())}
        arrays |= {f"optimizer_{i}": value.numpy() for i, value in enumerate(self.model.optimizer.variables)}
        arrays |= {f"best_{i}": value for i, value in enumerate(self.best_weights)}
        partial = self.file.with_suffix(".partial")
        with open(partial, "wb") as stream:
            facts = {"history": json.dumps(self.history), "identity": json.dumps(self.identity)}
            np.savez(stream, **{name: np.array(text) for name, text in facts.items()}, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.file)

    def restore(self) -> None:
        """Take up the saved state.

        Raises:
            UserError: the file is damaged, or of another run: every value of `identity` must be what it was.
        """
        try:
            with open(self.file, "rb") as stream, np.load(stream, allow_pickle=False) as saved:
                former, self.history = (json.loads(str(saved[name])) for name in ("identity", "history"))
                parts = {
                    part: [saved[f"{part}_{i}"] for i in range(sum(name.startswith(part) for name in saved.files))]
                    for part in ("model", "optimizer", "best")
                }
            changed = [name for name, value in self.identity.items() if former.get(name) != value]
            if changed:
                raise UserError(
                    f"{self.file} is of a run with another {', '.join(changed)}: resume with the same options"
                )
            self.model.set_weights(parts["model"])
            self.model.optimizer.build(self.model.trainable_variables)
            for variable, value in zip(self.model.optimizer.variables, parts["optimizer"], strict=True):
                variable.assign(value)
            self.best_weights = parts["best"]
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            raise UserError(f"{self.file} can't be resumed ({error}); remove it to start anew") from error


class _Epochs(tf.keras.callbacks.Callback):
    """Between Keras's fit and the network: the progress bar, validation, the record, early stopping."""

    def __init__(
        self, network: NeuralNetwork, epochs: int, steps: int, validate: Validate, patience: int, watch: Watch
    ):
        super().__init__()
        self.watch = watch
        self.network, self.epochs, self.steps = network, epochs, steps
        self.validate, self.patience = validate, patience

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()
        title = f"{self.network.name} {epoch + 1}/{self.epochs}"
        self.bar = tqdm(total=self.steps, desc=title, unit="batch", leave=False, ncols=80, disable=None)

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()
        self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()
        seconds = time.perf_counter() - self.begun
        logs.update(self.validate())
        self.network.record(logs)
        name, monitor = self.network.name, self.network.monitor
        best = " *" if self.network.best_epoch == epoch else ""
        figures = f"loss {logs['loss']:.4f}  {monitor} {logs[monitor]:.4f}"
        tqdm.write(f"{name} {epoch + 1}/{self.epochs}  {figures}  {seconds:.0f} s{best}")
        known, self.network.diagnosis = self.network.diagnosis, self.watch(self.network.epochs())
        if self.network.diagnosis and (known is None or known.kind != self.network.diagnosis.kind):
            tqdm.write(f"{name}: {self.network.diagnosis.message}")
        self.model.stop_training = self.network.finished(self.patience)
        if self.network.out_of_patience(self.patience):
            tqdm.write(f"{name}: stopped, {self.patience} epochs without a better {monitor}")
