"""Learning-rate schedules: the names of `train.optimizers.schedule`."""

from train.optimizers.schedule import *  # noqa: F403
