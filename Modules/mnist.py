"""The published warm-up: a small convolutional embedding of handwritten digits, whose ten clouds come apart in minutes.

    python train.py mnist

MNIST comes through tensorflow-datasets; where it can't be downloaded, scikit-learn's 1,797 digits take its place.
"""

import socket
from pathlib import Path

import cv2
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import modules
from dataset import vector_batches
from Modules import runtime
from Modules.evaluation import figures, report
from Modules.metric_learning.losses import make_loss
from Modules.metric_learning.quality import embedding_quality
from Modules.NeuralNetwork import NeuralNetwork, adam

layers = tf.keras.layers

SIZE = 28  # pixels a side
EMBEDDING = 64  # dimensions
MARGIN = 0.4  # as on lesions
BATCH = 128  # images
LEARNING_RATE = 1e-3  # of Adam
STEPS = 1500  # training steps at most, to a whole number of epochs: 4 of MNIST
PATIENCE = 10  # epochs without a better validation
HOST = "storage.googleapis.com"  # where tensorflow-datasets fetches MNIST
SHOWN = 2000  # test images in the t-SNE


def load_images() -> tuple[str, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Name, training and test set: images float32 [N, 28, 28, 1] in 0..1, digits int [N]."""
    import tensorflow_datasets as tfds  # takes seconds, and only this warm-up needs it

    try:
        if not tfds.builder("mnist", try_gcs=False).is_prepared():
            # Asked first, because tensorflow-datasets retries an unreachable host for minutes.
            socket.create_connection((HOST, 443), timeout=5).close()
        parts = tfds.as_numpy(tfds.load("mnist", split=["train", "test"], batch_size=-1, try_gcs=False))
        sets = [(part["image"] / np.float32(255), part["label"]) for part in parts]
        return "MNIST", *sets
    except (OSError, tf.errors.OpError, tfds.download.DownloadError) as error:
        print(f"MNIST can't be downloaded ({error});")
        print("using scikit-learn's digits instead.")
    images, digits = load_digits(return_X_y=True)
    images = np.stack([cv2.resize(image.reshape(8, 8) / 16, (SIZE, SIZE)) for image in images])[..., None]
    split = train_test_split(images.astype(np.float32), digits, test_size=0.2, stratify=digits, random_state=0)
    return "digits", (split[0], split[2]), (split[1], split[3])


def build_network() -> tf.keras.Model:
    """Images [B, 28, 28, 1] in 0..1 -> embeddings [B, 64] of unit length."""
    x = images = tf.keras.Input((SIZE, SIZE, 1))
    for filters in (32, 64, 128):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(EMBEDDING)(layers.Flatten()(x))
    return tf.keras.Model(images, layers.UnitNormalization(axis=-1, name="embedding")(x), name="digits")


def warm_up(folder: Path, seed: int, resume: bool = False) -> dict:
    """Train the embedding, report its kNN accuracy on the test set, draw its t-SNE; returns what it wrote as JSON."""
    runtime.claim(folder, resume)
    runtime.set_seeds(seed)
    name, (images, digits), test = load_images()
    print(f"{name}: {len(images)} training images, {len(test[0])} test images")
    training, validation, targets, held_out = train_test_split(
        images, digits, test_size=0.1, stratify=digits, random_state=seed
    )

    loss = make_loss("semi-hard", MARGIN)
    _, steps = vector_batches(training, targets, BATCH, seed)
    network = NeuralNetwork(
        build_network(),
        "embedding",
        folder,
        loss,
        adam(LEARNING_RATE),
        monitor="val_knn_accuracy",
        mode="max",
        identity={"seed": seed, "data": name},
    )

    def validate() -> dict[str, float]:
        embeddings = network.model.predict(validation, batch_size=1024, verbose=0)
        quality = embedding_quality(embeddings, held_out, None)
        return {"val_knn_accuracy": quality["knn_accuracy"], "val_silhouette": quality["silhouette"]}

    network.fit(
        lambda epoch: vector_batches(training, targets, BATCH, seed, epoch)[0],
        steps,
        -(-STEPS // steps),
        validate,
        PATIENCE,
        resume,
    )

    known, embeddings = (network.model.predict(part, batch_size=1024, verbose=0) for part in (training, test[0]))
    quality = embedding_quality(embeddings, test[1], None, reference=(known, targets, None))
    modules.save(network.model, folder / "embedding.keras")
    pictures = {
        "curves": figures.learning_curves(network.history, f"Embedding of {name}", network.best_epoch + 1),
        "tsne": figures.tsne(embeddings[:SHOWN], test[1][:SHOWN], f"Test set of {name}", class_names="0123456789"),
    }
    for title, figure in pictures.items():
        figures.save(figure, folder / "figures" / f"{title}.png")
    result = {"data": name, "seed": seed, "history": network.history, "test": quality}
    report.write_json(folder / "mnist.json", result)
    network.forget()
    print(f"kNN accuracy on {len(embeddings)} test images: {quality['knn_accuracy']:.4f}")
    print(f"Wrote {folder}/embedding.keras and {folder}/figures/tsne.png")
    return result
