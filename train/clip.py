"""Forwards to `train.optimizers.clip` for one version."""

import warnings

from train.optimizers.clip import *  # noqa: F403

warnings.warn("train.clip is now train.optimizers.clip", DeprecationWarning, stacklevel=2)
