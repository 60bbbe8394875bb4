"""The two errors that a run shows without a traceback."""


class TrainError(ValueError):
    """A setting, file or environment that the user can put right; the command line prints the message alone."""


class CheckpointError(RuntimeError):
    """A checkpoint that differs from what was written; the message names the file and the difference."""
