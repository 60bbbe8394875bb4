"""Runs that train an adapter: the weights of --init are frozen."""

import re
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.tokenizer.base import Tokenizer
from lora.config import AdapterError, LoraConfig
from lora.inject import add_adapters, parts
from lora.layer import LayerName, ModulesToSave
from lora.targets import by_pattern, published_modules
from model.account import align_columns
from model.parameters import TARGETS
from model.weights import role_of, weight_table
from quant.linear import count_parameters
from train.config import TrainConfig

NAME = "default"


def add_adapter(config: TrainConfig, network: nn.Module, tokenizer: Tokenizer, *, new_head: bool) -> None:
    """Add the adapter of --adapter. A head that --init lacks is random, so all of its weights are trained."""
    method = config.method
    if config.run.adapter == "prompt" and method.text:
        method = replace(method, text=None, ids=tuple(tokenizer.encode(method.text)))
    if new_head:
        method = replace(method, train_whole=(*method.train_whole, "^head"))
    add_adapters(network, method, NAME, seed=config.run.seed)
    published = published_modules(network)
    names = [path.partition(".parts.")[0].replace(".base", "") for path in parts(network, NAME)]
    places = [LayerName(name, published.get(name, name)) for name in names]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, field, {}):
            if not any(by_pattern({pattern: True}, place, False) for place in places):
                option = f"--{config.run.adapter}.{field.replace('_', '-')}"
                raise AdapterError(f"{option} {pattern!r} ends no adapted layer's name, such as {', '.join(places[0])}")


def role(network: nn.Module, name: str) -> str:
    """The role that decides weight decay: "matrix" for an adapter's matrices, "bias" for its vectors, prompts and prefixes.
    For the network's own biases, and for trained copies of its modules, the role in the family's table."""
    path, found, leaf = name.partition(f".parts.{NAME}.")
    if found and not isinstance(network.get_submodule(path), ModulesToSave):
        return "matrix" if leaf in MATRICES else "bias"
    own = f"{path}.{leaf}" if found else name
    return role_of(network.config, own.replace(".base.", "."))


MATRICES = ("A", "B", "down", "up")  # of LoRA and its variants, and of a bottleneck adapter


def rate(config: TrainConfig, name: str) -> float:
    """The parameter's learning rate as a multiple of --lr: LoRA+ trains B faster than A."""
    return getattr(config.method, "b_lr_ratio", 1.0) if name.endswith(f".parts.{NAME}.B") else 1.0


def table(network: nn.Module) -> str:
    """A table of the trainable parameters by kind of layer, and their share of all parameters."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            path, _, leaf = name.partition(f".parts.{NAME}.")
            sizes[re.sub(r"\.\d+\.", ".N.", path.replace(".base", "")) + (f" {leaf}" if leaf else "")].append(parameter.numel())
    rows = [("trained", "tensors", "parameters")]
    rows += [(kind, f"{len(each)}", f"{sum(each):,}") for kind, each in sizes.items()]
    trained, total = sum(map(sum, sizes.values())), count_parameters(network)
    rows.append((f"in all, of {total:,}", f"{sum(map(len, sizes.values()))}", f"{trained:,} ({trained / total:.2%})"))
    return align_columns(rows)


@torch.no_grad()
def cast_frozen_weights(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the frozen weights to autocast's 16-bit dtype, once, as nothing updates them. Norms and embeddings are cast too, and
    with them the residual stream. Trainable parameters stay in float32, and so does T5's wide matrix, which overflows
    float16."""
    if dtype is None:
        return
    wide = {row.name for row in weight_table(network.config).values() if row.layout == "wide" and dtype == torch.float16}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and f".parts.{NAME}." not in name and name.replace(".base.", ".") not in wide:
            parameter.data = parameter.data.to(dtype)


def has_memory_estimate(config: TrainConfig) -> bool:
    """True where `model.memory` can estimate this run: without an adapter, or with plain LoRA on the matrices of the blocks."""
    if config.run.qat != "none":
        return False
    if config.method is None:
        return True
    plain = LoraConfig(r=config.lora.r, targets=config.lora.targets, alpha=config.lora.alpha, b_lr_ratio=config.lora.b_lr_ratio)
    return config.run.adapter == "lora" and config.lora == plain and config.lora.targets in TARGETS


def trainable_state(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of such a network that a checkpoint holds: trainable parameters, and the buffers of AdaLoRA's averages."""
    found = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for path, part in parts(network, NAME).items():
        found |= {f"{path}.{name}": buffer for name, buffer in part.named_buffers()}
    return found
