"""Resizing of the vocabulary: rows of the embedding and of the head are added or removed at the end."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.heads import LanguageHead
from model.network import Network


@torch.no_grad()
def resize_vocabulary(network: Network, vocab_size: int) -> Network:
    """Resize the embedding and a language head, tied or not, with its bias, to `vocab_size` rows; returns the network.

    New rows are the mean of the old ones, computed in float32: a new token is then no likelier than others on average, while
    random rows give it logits near zero, often above all trained ones. Source: Hewitt 2021, "Initializing new word
    embeddings for pretrained language models", https://nlp.stanford.edu/~johnhew/vocab-expansion.html; transformers'
    resize_token_embeddings draws around the same mean. Errors (ConfigError): a quantized head.
    """
    if vocab_size < 1:
        raise ConfigError(f"vocab_size={vocab_size} must be at least 1")
    embedding, head = network.body.embedding, network.head
    embedding.weight = nn.Parameter(resize_rows(embedding.weight, vocab_size), requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = vocab_size
    if isinstance(head, LanguageHead):
        if not isinstance(head.weight, nn.Parameter):
            raise ConfigError("the head's weights are quantized: resize the folder that it was made from")
        if not network.config.tie_embeddings:
            head.weight = nn.Parameter(resize_rows(head.weight, vocab_size), requires_grad=head.weight.requires_grad)
        if head.bias is not None:
            constant = network.config.family == "bart"  # a constant bias, 0 for new tokens
            bias = resize_rows(head.bias[:, None], vocab_size)[:, 0]
            bias = bias.clone() if not constant else torch.cat((head.bias, head.bias.new_zeros(vocab_size)))[:vocab_size]
            head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        head.out_features = vocab_size
    config = network.config.replace(vocab_size=vocab_size)
    for module in network.modules():
        if getattr(module, "config", None) is network.config:
            module.config = config
    network.config = config
    network.tie_weights()
    return network


@torch.no_grad()
def add_rows(network: Network, ids: Sequence[int]) -> Network:
    """Give new ids rows at the mean of all others, in the embedding and a language head; returns the network.

    Rows are added as `resize_vocabulary` does; a row that exists already, unused, is set to the mean too.
    """
    old_size = network.config.vocab_size
    unused = [id for id in ids if id < old_size]
    if unused:
        tables = [network.body.embedding.weight]
        if isinstance(network.head, LanguageHead) and not network.config.tie_embeddings:
            tables.append(network.head.weight)
        others = torch.ones(old_size, dtype=torch.bool)
        others[unused] = False
        for weight_VD in tables:
            wide = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))
            weight_VD[unused] = wide[others.to(weight_VD.device)].mean(0).to(weight_VD.dtype)
    return resize_vocabulary(network, max(old_size, *(id + 1 for id in ids)))


def resize_rows(weight_VD: Tensor, rows: int) -> Tensor:
    """Return the first `rows` rows, or all rows and copies of their mean below them."""
    if rows <= len(weight_VD):
        return weight_VD[:rows].clone()
    mean_D = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32)).mean(0).to(weight_VD.dtype)
    return torch.cat((weight_VD, mean_D.expand(rows - len(weight_VD), -1)))
