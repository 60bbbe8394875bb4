"""The labels of a network: their names in its config.json, and the order that a folder has already."""

from collections.abc import Sequence

from data.tokenizer.base import Tokenizer
from data.transforms.framing import Framer, choose_pad_id
from data.transforms.labels import labels_from_config
from model.config import ConfigError, ModelConfig
from model.folders import HubError
from model.hub import read_config
from model.weights import head_spec
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


def with_labels(base: ModelConfig, labels: Sequence[str], problem_type: str | None = None) -> ModelConfig:
    """Return a network's config with the number and names of its labels, as transformers writes them.

    problem_type: of a network for whole texts; for tokens config.json has none.
    """
    named = {
        "id2label": {str(id): name for id, name in enumerate(labels)},
        "label2id": {name: id for id, name in enumerate(labels)},
    }
    if problem_type is not None:
        named["problem_type"] = problem_type
    return base.replace(labels=len(labels), extra={**base.extra, **named})


def for_whole_texts(base: ModelConfig, tokenizer: Tokenizer, framer: Framer, pool: str | None = None) -> ModelConfig:
    """Return a network's config with a pad that ends no text: transformers' decoders read the last token that is no padding.

    pool: of the head; None: the config's own.

    Errors (ConfigError): an encoder-decoder whose class in transformers looks for an end that this tokenizer does not write.
    """
    if pool is not None:
        base = base.replace(pool=pool)
    spec = head_spec(base)
    if base.architecture == "encoder-decoder" and spec.architecture and framer.last_token != base.eos_id:
        raise ConfigError(
            f"{spec.architecture} reads a text off its last eos, id {base.eos_id}, and this tokenizer "
            f"{'puts nothing behind a text' if framer.last_token is None else f'ends texts with id {framer.last_token}'}"
        )
    if base.architecture == "encoder":
        return base
    return base.replace(pad_id=choose_pad_id(tokenizer, framer.last_token, known=[base.pad_id]))
