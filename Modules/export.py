"""The saved model in other forms, for programs without Keras: each checked against the model before it is kept."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from Modules.cli import UserError
from Modules.inference import optimised

PICTURES = 8  # that are compared
TOLERANCE = 1e-4  # of the probability
OPSET = 17  # of ONNX: the newest but one that tf2onnx 1.16 knows


def export(model: tf.keras.Model, kind: str, file: Path, pictures: np.ndarray) -> float:
    """Write `model` (images float32 [B, S, S, 3] in 0..255 -> probability [B, 1]) as `file`, a folder for saved_model.

    Args:
        pictures: uint8 [N, S, S, 3], on which the largest difference, which is returned, is measured.

    Raises:
        UserError: it says something else than the model, can't be written, or a package is not installed; nothing is
            left then.
    """
    partial = file.with_name(f"{file.name}.partial")
    images = pictures.astype(np.float32)
    try:
        run = {"tflite": _tflite, "onnx": _onnx, "saved_model": _saved_model}[kind](optimised(model), partial)
        difference = float(np.abs(run(images) - model.predict_on_batch(images)).max())
        if not difference <= TOLERANCE:
            raise UserError(f"{file} was not written: as {kind} the model says something else, by {difference:.2g}")
        if file.is_dir():
            shutil.rmtree(file)
        partial.replace(file)
    except (OSError, tf.errors.OpError) as error:
        reason = error.message if isinstance(error, tf.errors.OpError) else error.strerror or error
        raise UserError(f"can't write {file} ({reason})") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return difference


def _tflite(model: tf.keras.Model, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    file.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    interpreter = tf.lite.Interpreter(str(file))
    place, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.allocate_tensors()

    def one(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(place, image[None])
        interpreter.invoke()
        return interpreter.get_tensor(result)[0]

    return lambda images: np.stack([one(image) for image in images])


def _onnx(model: tf.keras.Model, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise UserError(
            f"--export onnx needs {error.name}: pip install --no-deps -r requirements-onnx.txt, then the same again"
        ) from None
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)  # it warns of variables that a Keras model does not have
    signature = [tf.TensorSpec(model.input_shape, tf.float32, name="image")]
    tf2onnx.convert.from_keras(model, signature, opset=OPSET, output_path=str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probability"], {"image": images})[0]


def _saved_model(model: tf.keras.Model, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    graph = tf.Module()
    graph.model = model  # whose variables are saved with it
    signature = [tf.TensorSpec(model.input_shape, tf.float32, name="image")]
    graph.serve = tf.function(
        lambda image: {"probability": model(image, training=False)}, input_signature=signature, autograph=False
    )
    tf.saved_model.save(graph, str(folder), {"serving_default": graph.serve})
    run = tf.saved_model.load(str(folder)).signatures["serving_default"]
    return lambda images: run(tf.constant(images))["probability"].numpy()
