"""The order of labels that a network has already."""

from data.transforms.labels import labels_from_config
from model.folders import HubError
from model.hub import read_config
from train.config import TrainConfig
from train.runs.checkpoint import checkpoints
from train.runs.open import resolve


def initial_labels(config: TrainConfig) -> tuple[str, ...] | None:
    """Return the labels in the order of the weights' ids: from the run's own checkpoints, else from --init."""
    if config.run.init is None:
        return None
    own = checkpoints(config.run.out) if config.method is None and config.run.out is not None else []
    for folder in own:  # all have the same; --init may have been deleted
        try:
            return labels_from_config(read_config(folder, any_head=True).extra.get("id2label"))
        except HubError:
            continue
    return labels_from_config(read_config(resolve(config.run.init), any_head=True).extra.get("id2label"))
