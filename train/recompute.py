"""Recomputation: a block keeps its input alone, or little more, and runs again when the backward reaches it.

Memory for time: of L blocks that keep A bytes each, L inputs stay and one block's A, for one more forward of the blocks,
a third of a step at the most. A block runs again in the state that it first ran in (autocast, and torch's random state, so
that dropout drops the same numbers): the gradients are the same, bit for bit.
Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198, section 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten = torch.ops.aten
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
ATTENTIONS = frozenset(
    (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    )
)


def keep_products(context: SelectiveCheckpointContext, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Keep what costs most to compute again: the results of matrix products and of attention; norms, activation functions,
    dropout and sums run again.

    Attention with dropout runs again too: an operation whose result is kept is skipped the second time, and the random
    numbers that it took the first time would go to the next dropout.
    """
    if op in PRODUCTS or (op in ATTENTIONS and not attention_dropout(op, inputs, options)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def attention_dropout(op: Any, inputs: tuple, options: dict) -> float:
    """The value of `dropout_p`, which each of torch's attention operators has at a place of its own."""
    place = [argument.name for argument in op._schema.arguments].index("dropout_p")
    return inputs[place] if place < len(inputs) else options.get("dropout_p", 0.0)


def run_again(block: nn.Module, forward: Callable[..., Tensor], keep: Callable | None, *inputs: Any) -> Tensor:
    """The block's forward, kept or recomputed. In eval mode and without gradients nothing would be kept: plain forward.

    Non-reentrant: parameters inside get their gradients also where no input needs one (frozen embeddings under adapters;
    the reentrant kind drops them in silence), and a second backward or `torch.autograd.grad` works.
    """
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs)
    contexts = {} if keep is None else {"context_fn": partial(create_selective_checkpoint_contexts, keep)}
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True, **contexts)


# mode -> what of a block is kept beside its input: a policy, None for nothing; a mode "none" recomputes nothing
KEEPS: dict[str, Callable | None] = {"blocks": None, "selective": keep_products}
MODES = ("none", *KEEPS)


def recompute(network: nn.Module, mode: str, every: int = 1) -> nn.Module:
    """Let blocks 0, k, 2k, … (k = `every`) of every stack run again in the backward; returns the network.

    "none": no block. "blocks": all that a block made is made again. "selective": but for the results of matrix products
    and of attention, which stay. The block's own `forward` is replaced, so that modules and parameters keep their names;
    the last call counts. Before `block.compile()` and `fully_shard(block)`: both wrap the call around `forward`.

    >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])})
    >>> [name for name, _ in recompute(network, "blocks").named_parameters()]
    ['blocks.0.weight', 'blocks.0.bias']
    """
    if mode not in MODES:
        raise ValueError(f"unknown recomputation {mode!r}; known: {', '.join(MODES)}")
    if every < 1:
        raise ValueError(f"every={every}: recompute every block (1), every second (2), …")
    for blocks in stacks(network):
        for index, block in enumerate(blocks):
            vars(block).pop("forward", None)  # of an earlier call
            if mode != "none" and index % every == 0:
                block.forward = partial(run_again, block, block.forward, KEEPS[mode])
    return network


def stacks(network: nn.Module) -> list[nn.ModuleList]:
    """The blocks of a decoder, of an encoder, or of both."""
    return [module for name, module in network.named_modules() if name.rpartition(".")[2] == "blocks"]
