"""Forwards to `train.losses` for one version: `train.loss.cross_entropy` is `train.losses.cross_entropy`."""

import warnings

from train import losses

__path__ = losses.__path__
warnings.warn("train.loss is now train.losses", DeprecationWarning, stacklevel=2)
