"""Import this first: it silences what TensorFlow and TensorFlow Addons say when they are imported."""

import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.filterwarnings("ignore", message=r"\s*TensorFlow Addons \(TFA\) has ended development")
