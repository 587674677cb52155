"""Does a picture lie where the model knows anything? A probability for a cat, a page of text or noise means nothing.

The embedding can't tell: it is trained to forget all but the class, and whatever is shown lands near one of two poles.
The texture can: means and deviations of the maps of an inner layer, and their Mahalanobis distance to the training
images (Lee et al., "A simple unified framework for detecting out-of-distribution samples", NeurIPS 2018; one Gaussian
for all classes, shrunk as in Ledoit and Wolf, JMVA 2004).
"""

import math

import numpy as np
import tensorflow as tf

FALSE_ALARMS = 0.02  # share of dermoscopic pictures that may be refused
FINEST = 10  # a map counts while it has one value in so many pixels of the picture a side
SMALLEST = 1e-6  # share of the largest variance; less counts as that


def texture_layer(model: tf.keras.Model) -> tf.keras.layers.Layer:
    """The widest, and of those the last, layer of the backbone whose maps have at least 1 / FINEST of the side.

    Raises:
        ValueError: no layer has.
    """
    least = model.input_shape[1] // FINEST
    kinds = tf.keras.layers.ReLU, tf.keras.layers.Activation, tf.keras.layers.Concatenate
    fine = [
        layer
        for layer in model.layers
        if isinstance(layer, kinds) and len(shape := layer.get_output_at(0).shape) == 4 and shape[1] >= least
    ]
    if not fine:
        raise ValueError(f"no layer has maps of {least} pixels a side or more to tell texture from")
    return max(reversed(fine), key=lambda layer: layer.get_output_at(0).shape[-1])


def texture(model: tf.keras.Model) -> tf.Tensor:
    """The texture float32 [B, F] of the pictures that a saved model is given, as a further output.

    Of a layer that sees several views of a picture only the first counts. Roots, because maps after a ReLU are skewed.
    """
    maps = tf.cast(texture_layer(model).get_output_at(0), tf.float32)  # [B, h, w, C]
    values = tf.concat([tf.reduce_mean(maps, (1, 2)), tf.math.reduce_std(maps, (1, 2))], axis=1)  # [B, 2 C]
    return tf.sign(values) * tf.sqrt(tf.abs(values))


def fit(textures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [F] and whitening [F, F] of the training images' textures [N, F], both float32."""
    from sklearn.covariance import ledoit_wolf  # slow to import, and not needed to score a picture

    centre = textures.mean(axis=0, dtype=np.float64)
    covariance, _ = ledoit_wolf(textures - centre, assume_centered=True)
    variances, axes = np.linalg.eigh(covariance)
    variances = np.maximum(variances, max(variances[-1] * SMALLEST, np.finfo(np.float32).tiny))
    return centre.astype(np.float32), (axes / np.sqrt(variances)).astype(np.float32)


def distance(textures: np.ndarray, gallery: dict) -> np.ndarray:
    """The logarithm of the Mahalanobis distance of textures [N, F] to the gallery's `centre` and `whitening`: [N]."""
    whitened = (np.asarray(textures, np.float64) - gallery["centre"]) @ gallery["whitening"]
    return np.log(np.maximum(np.linalg.norm(whitened, axis=1), np.finfo(np.float32).tiny))


def limit(distances: np.ndarray) -> float:
    """The distance that a share FALSE_ALARMS of such pictures exceeds, from those [N] of the validation images.

    Split conformal (Bates et al., "Testing for outliers with conformal p-values", Ann. Statist. 2023, section 2):
    whatever the distribution, a picture drawn like the N lies beyond it with at most that probability, on average over
    validation sets. Of fewer than 1 / FALSE_ALARMS - 1 pictures, where nothing keeps that promise, it is the largest.
    """
    n = len(distances)
    return float(np.sort(distances)[min(n, math.ceil((n + 1) * (1 - FALSE_ALARMS))) - 1])
