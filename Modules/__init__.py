"""What the scripts at the top share. TensorFlow is told to be quiet before anything imports it."""

import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.filterwarnings("ignore", message=r"\s*TensorFlow Addons \(TFA\) has ended development")
