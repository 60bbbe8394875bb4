"""Forwards to `train.optimizers` for one version."""

import warnings

from train.optimizers.adamw import *  # noqa: F403
from train.optimizers.build import *  # noqa: F403
from train.optimizers.groups import *  # noqa: F403

warnings.warn("train.optim is now train.optimizers", DeprecationWarning, stacklevel=2)
