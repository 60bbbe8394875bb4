"""Frozen weights: no gradient, no moments, no decay. By a part of the network, or by a pattern of names.

    all           the weights that --init brings: only the new head is trained
    body          embeddings and layers: only the head is trained, new or not
    embeddings    token, position and type embeddings, and their norm
    top:K         all below the top K layers, which are trained with the final norm and the head
    REGEX         weights whose name, ours or the published one, has a match

`all` and `body` freeze the same weights; `train.setup` refuses `all` where the head is not new.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

from model.config import ModelConfig
from model.heads import is_tied
from model.parameters import parameters
from model.weights import weight_table
from train.config import RunConfig
from train.layer_groups import EMBEDDINGS, HEAD, layer_groups
from train.runs.errors import TrainError

TOP = re.compile(r"top:(\d+)")
PARTS = ("all", "body", EMBEDDINGS)


def freeze(network: nn.Module, what: str) -> list[str]:
    """Freeze the trainable parameters that `what` selects, and return their names.

    A tied matrix has two names of its own and two published ones (GPT-2's: body.embedding.weight, head.weight,
    transformer.wte.weight, lm_head.weight), and a pattern may match any of them; as a part it belongs to the
    embeddings. Errors (TrainError): nothing is selected, more top layers than there are, or nothing left to train.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    selected = select(network.config, {name: aliases[id(parameter)] for name, parameter in named.items()}, what)
    for name in selected:
        named[name].requires_grad_(False)
    return selected


def select(config: ModelConfig, aliases: Mapping[str, list[str]], what: str) -> list[str]:
    """Return the names that `what` selects among trainable parameters. `aliases`: each name, with all names of its tensor."""
    if what in PARTS or TOP.fullmatch(what):
        selected = [name for group in frozen_groups(config, aliases, what) for name in group]
    else:
        selected = match(config, aliases, what)
    if len(selected) == len(aliases):
        is_part = what in PARTS or TOP.fullmatch(what)
        tied = ": head and embedding are one matrix, which is frozen with the embeddings" if is_part and is_tied(config) else ""
        raise TrainError(f"--freeze {what} leaves nothing to train{tied}")
    return selected


def selected_names(config: ModelConfig, what: str) -> list[str]:
    """Return the names that `what` selects in a network that is not built."""
    names = [name for name, parameter in parameters(config).items() if parameter.trained]
    tied = {"body.embedding.weight": ["head.weight"]} if is_tied(config) else {}
    return select(config, {name: [name, *tied.get(name, ())] for name in names}, what)


def frozen_groups(config: ModelConfig, names: Mapping[str, object], what: str) -> list[list[str]]:
    """Return the layer groups that a part's name selects."""
    groups = layer_groups(config, names)
    if what == EMBEDDINGS:
        return [groups[EMBEDDINGS]]
    found = TOP.fullmatch(what)
    trained = int(found[1]) if found else 0  # layers from the top
    layers = [group for name, group in groups.items() if name not in (HEAD, EMBEDDINGS)]
    if trained > len(layers):
        split = f", the decoder's {config.decoder_depth} and the encoder's {config.depth} below them"
        raise TrainError(f"--freeze {what}: the network has {len(layers)} layers{split * (config.decoder_depth is not None)}")
    return [*layers[trained:], groups[EMBEDDINGS]]


def match(config: ModelConfig, aliases: Mapping[str, list[str]], pattern: str) -> list[str]:
    """Return the parameters with a name, ours or the published one, in which the regular expression is found."""
    if pattern.startswith("top:"):
        raise TrainError(f"--freeze {pattern}: top:K, with the number of layers from the top that are trained")
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise TrainError(f"--freeze {pattern}: not a regular expression: {error}") from None
    published = {row.name: row.published for row in weight_table(config).values()}
    spoken = {name: [form for each in forms for form in (each, published.get(each, each))] for name, forms in aliases.items()}
    selected = [name for name, forms in spoken.items() if any(map(search, forms))]
    if not selected:
        kinds = kinds_of(aliases)
        forms = kinds_of(form for each in spoken.values() for form in each)
        parts = {part for kind in forms for part in (kind, *kind.split("."))}
        near = difflib.get_close_matches(pattern, sorted(parts | {*PARTS}), 3, 0.6)
        meant = f" ({' or '.join(near)}?)" if near else ""
        known = f"{', '.join(kinds)}; or the published names"
        raise TrainError(f"--freeze {pattern} is found in no name of a weight{meant}: {known}")
    return selected


def kinds_of(names: Iterable[str]) -> list[str]:
    """
    >>> kinds_of(["h.0.mlp.weight", "h.1.mlp.weight", "wpe.weight"])
    ['h.N.mlp.weight', 'wpe.weight']
    """
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def frozen_names(network: nn.Module, run: RunConfig) -> frozenset[str]:
    """The parameters that --freeze or --unfreeze freezes at present; none where neither is asked for."""
    if run.freeze is None and run.unfreeze is None:
        return frozenset()
    return frozenset(name for name, parameter in network.named_parameters() if not parameter.requires_grad)
