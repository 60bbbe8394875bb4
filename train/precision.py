"""Forwards to `train.optimizers.precision` for one version."""

import warnings

from train.optimizers.precision import *  # noqa: F403
from train.optimizers.scaler import *  # noqa: F403

warnings.warn("train.precision is now train.optimizers.precision", DeprecationWarning, stacklevel=2)
