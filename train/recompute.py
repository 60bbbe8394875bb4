"""Recomputation (activation checkpointing): a block saves its input alone, or little more, and runs again in the backward.

It trades time for memory: instead of L blocks' A bytes each, L inputs and one block's A bytes are saved, for one more forward
of the blocks, a third of a step at the most. A block is recomputed with the autocast and the random state of its first run,
so dropout drops the same numbers: the gradients are the same, bit for bit. torch is imported inside functions: `--help` lists
the modes.
Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198, section 5.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext


@cache
def expensive_operators() -> tuple[frozenset, frozenset]:
    """Return torch's operators of matrix products, and those of fused attention."""
    import torch

    aten = torch.ops.aten
    products = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default))
    attentions = frozenset(
        (
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        )
    )
    return products, attentions


def save_products(context: "SelectiveCheckpointContext", op: Any, *inputs: Any, **options: Any) -> "CheckpointPolicy":
    """Save the results of matrix products and of attention, which cost most to compute again; norms, activation functions,
    dropout and sums are recomputed.

    Attention with dropout is recomputed too: an operation whose result is saved is skipped the second time, and the random
    numbers that it took the first time would go to the next dropout.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    products, attentions = expensive_operators()
    if op in products or (op in attentions and not attention_dropout(op, inputs, options)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def attention_dropout(op: Any, inputs: tuple, options: dict) -> float:
    """Return the argument `dropout_p`, whose position differs between torch's attention operators."""
    index = [argument.name for argument in op._schema.arguments].index("dropout_p")
    return inputs[index] if index < len(inputs) else options.get("dropout_p", 0.0)


def checkpointed_forward(
    block: "nn.Module", forward: "Callable[..., Tensor]", policy: Callable | None, *inputs: Any
) -> "Tensor":
    """Run the block's forward under torch's checkpointing; plainly in eval mode and without gradients, where nothing is saved.

    Non-reentrant: parameters inside get their gradients also where no input needs one (frozen embeddings under adapters;
    the reentrant kind drops them in silence), and a second backward or `torch.autograd.grad` works.
    """
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs)
    contexts = {} if policy is None else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True, **contexts)


# mode -> the policy of what a block saves beside its input; None: nothing. The mode "none" recomputes nothing.
POLICIES: dict[str, Callable | None] = {"blocks": None, "selective": save_products}
MODES = ("none", *POLICIES)


def recompute(network: "nn.Module", mode: str, every: int = 1) -> "nn.Module":
    """Recompute blocks 0, k, 2k, … (k = `every`) of every stack in the backward; return the network.

    "none": no block. "blocks": everything in a block. "selective": everything but the results of matrix products and of
    attention. The block's own `forward` is replaced, so modules and parameters keep their names; the last call counts.
    Call it before `block.compile()` and `fully_shard(block)`: both wrap the call around `forward`.
    Errors (ValueError): an unknown mode; `every` below 1.

    >>> from torch import nn
    >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])})
    >>> [name for name, _ in recompute(network, "blocks").named_parameters()]
    ['blocks.0.weight', 'blocks.0.bias']
    """
    if mode not in MODES:
        raise ValueError(f"unknown recomputation {mode!r}; known: {', '.join(MODES)}")
    if every < 1:
        raise ValueError(f"every={every}: recompute every block (1), every second (2), …")
    for blocks in block_lists(network):
        for index, block in enumerate(blocks):
            vars(block).pop("forward", None)  # of an earlier call
            if mode != "none" and index % every == 0:
                block.forward = partial(checkpointed_forward, block, block.forward, POLICIES[mode])
    return network


def block_lists(network: "nn.Module") -> "list[nn.ModuleList]":
    """Return the lists of blocks: a decoder's, an encoder's, or both."""
    return [module for name, module in network.named_modules() if name.rpartition(".")[2] == "blocks"]
