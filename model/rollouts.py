"""Rollouts: replies sampled from a policy for reinforcement learning, many prompts at a time, with their log-probabilities.

Beside `model.generate` it knows no filters (the log-probabilities are those of the whole distribution), takes its noise as
numbers, so that a reply depends on its own row alone, and reads nothing for rows that have ended: they leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.decoding import Decoding, eval_mode
from model.parameters import cache_bytes

BATCH_BYTES = 1 << 30  # of the cache and of a step's probabilities, where the caller names no batch size


class SampledReply(NamedTuple):
    """A sampled reply: its ids, with the stop id if it has ended, and the log-probability of each."""

    ids: list[int]
    log_probs: list[float]
    has_ended: bool


class _Request(NamedTuple):
    index: int  # of the caller's prompt
    prompt: tuple[int, ...]
    room: int


def sample_replies(
    network: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    uniforms_NT: Tensor,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    pad_id: int = 0,
    context: int,
    batch_size: int | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> list[SampledReply]:
    """Sample a reply to each prompt (ids) from softmax(logits / temperature), in eval and inference mode.

    Token t of reply n is the least v with Σ_{w ≤ v} p_w > uniforms_NT[n, t], numbers of [0, 1): a function of prompt and noise,
    whatever else is in the batch (up to rounding, which decides where a number falls on the border of two tokens).
    temperature 0 takes the most probable token, and its log-probabilities are those at temperature 1. They are computed in
    float32, or wider where the network is.

    A reply ends with one of stop_ids, which is part of it, or, without having ended, at min(T, context - len(prompt)) tokens.
    Prompts are sorted by length and left-padded, batch_size at a time; None: as many as fit BATCH_BYTES. Equal prompts of
    a batch are read once. on_progress(count) is told how many replies are complete, each time that it changes.

    Errors: an empty prompt or one without room, noise of another shape or range, a context beyond the network's, a network that
    continues no text or whose text depends on its batch (ConfigError).
    """
    _check(network, prompts, uniforms_NT, temperature, context, batch_size)
    device, most = next(network.parameters()).device, uniforms_NT.size(1)
    requests = [_Request(n, tuple(prompt), min(most, context - len(prompt))) for n, prompt in enumerate(prompts)]
    requests.sort(key=lambda request: len(request.prompt))  # stable: copies of a prompt stay together
    replies: list[SampledReply | None] = [None] * len(requests)
    count = 0
    with eval_mode(network):
        uniforms_NT = uniforms_NT.to(device, torch.float64)
        for batch in _batches(network, requests, batch_size):
            for index, reply in _sample_batch(network, batch, uniforms_NT, frozenset(stop_ids), temperature, pad_id):
                replies[index] = reply
                count += 1
                if on_progress is not None:
                    on_progress(count)
    return replies


def _batches(network: nn.Module, requests: list[_Request], batch_size: int | None) -> Iterator[list[_Request]]:
    """Yield the requests in batches; by default none needs more than BATCH_BYTES, or it is one request."""
    if batch_size is None:
        itemsize = next(network.parameters()).dtype.itemsize
        columns = max((len(request.prompt) for request in requests), default=0) + max((r.room for r in requests), default=0)
        numbers = 5 * 8 * network.config.vocab_size  # logits and what `choose_tokens` makes of them
        batch_size = max(BATCH_BYTES // (cache_bytes(network.config, columns, itemsize).full + numbers), 1)
    for begin in range(0, len(requests), batch_size):
        yield requests[begin : begin + batch_size]


def _sample_batch(
    network: nn.Module,
    batch: list[_Request],
    uniforms_NT: Tensor,
    stop_ids: frozenset[int],
    temperature: float,
    pad_id: int,
) -> Iterator[tuple[int, SampledReply]]:
    """Yield (the caller's index, the reply) of each row when it is complete."""
    device = uniforms_NT.device
    unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(request.prompt for request in batch))}
    width = max(map(len, unique))
    ids_BT = torch.tensor([(pad_id,) * (width - len(prompt)) + prompt for prompt in unique], device=device)
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique], device=device)
    text = Decoding(network, ids_BT, mask_BT, max_new_tokens=max(request.room for request in batch))
    logits_BV = text.next_logits()
    if len(unique) < len(batch):
        row_B = torch.tensor([unique[request.prompt] for request in batch], device=device)
        logits_BV = logits_BV[row_B]
        text.select(row_B)
    rows = [(request, SampledReply([], [], False)) for request in batch]
    uniforms_BT = uniforms_NT[[request.index for request in batch]]
    for step in range(uniforms_BT.size(1)):
        token_B, log_prob_B = choose_tokens(logits_BV, uniforms_BT[:, step], temperature)
        text.append(token_B)
        left = []
        for row, token, log_prob in zip(range(len(rows)), token_B.tolist(), log_prob_B.tolist(), strict=True):
            request, reply = rows[row]
            reply.ids.append(token)
            reply.log_probs.append(log_prob)
            if token in stop_ids or len(reply.ids) == request.room:
                yield request.index, reply._replace(has_ended=token in stop_ids)
            else:
                left.append(row)
        if not left:
            return
        if len(left) < len(rows):
            order = close_gaps(left)
            rows = [rows[row] for row in order]
            row_B = torch.tensor(order, device=device)
            uniforms_BT = uniforms_BT[row_B]
            text.select(row_B)
        logits_BV = text.next_logits()


def close_gaps(left: list[int]) -> list[int]:
    """Order the rows that are left so that as few as possible move: the last ones fill the places of those that are gone.

    >>> close_gaps([0, 2, 3, 5])  # 1 and 4 are gone
    [0, 5, 2, 3]
    """
    stay = set(row for row in left if row < len(left))
    movers = iter(row for row in reversed(left) if row >= len(left))
    return [row if row in stay else next(movers) for row in range(len(left))]


def choose_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return a token for each row by the inverse of the cumulative distribution, and its log-probability; B each.

    With p = softmax(logits / temperature) it is the least v with Σ_{w ≤ v} p_w > uniform, summed in float64; temperature 0:
    the largest logit, and p at temperature 1. A token of probability 0 is never chosen.
    """
    wide_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    score_BV = (wide_BV - wide_BV.amax(-1, keepdim=True)) / (temperature or 1)  # the difference first: no overflow
    total_BV = score_BV.exp().cumsum(-1, dtype=torch.float64)
    total_B1 = total_BV[:, -1:]
    if temperature == 0:
        token_B1 = wide_BV.argmax(-1, keepdim=True)
    else:
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # for a product that is rounded up to the total
        token_B1 = torch.searchsorted(total_BV, torch.minimum(uniform_B[:, None] * total_B1, below_B1), right=True)
    log_prob_B1 = score_BV.gather(-1, token_B1) - total_B1.log()
    return token_B1[:, 0], log_prob_B1[:, 0]


def _check(
    network: nn.Module,
    prompts: Sequence[Sequence[int]],
    uniforms_NT: Tensor,
    temperature: float,
    context: int,
    batch_size: int | None,
) -> None:
    config = network.config
    if config.architecture == "encoder-decoder":
        raise ConfigError(f"{config.family} of this config is an encoder-decoder: rollouts continue a decoder's prompts")
    if not temperature >= 0 or temperature == float("inf"):  # so that NaN is refused too
        raise ConfigError(f"temperature={temperature} must be 0 (take the best token) or above, and finite")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1, or None")
    limit = config.context - network.body.num_virtual_tokens
    if context > limit:
        raise ConfigError(f"context={context} exceeds the {limit} tokens that the network reads beside its virtual ones")
    for rope in {layer.rope for layer in config.layers}:
        if rope is not None and rope.kind == "dynamic" and context > rope.trained_context:
            raise ConfigError(
                f"dynamic RoPE scaling changes a text with the longest of its batch beyond {rope.trained_context} tokens: "
                f"context={context} must not exceed them"
            )
    if uniforms_NT.ndim != 2 or uniforms_NT.size(0) != len(prompts):
        raise ConfigError(f"uniforms_NT of shape {tuple(uniforms_NT.shape)}: expected ({len(prompts)}, most new tokens)")
    if not bool(((uniforms_NT >= 0) & (uniforms_NT < 1)).all()):
        raise ConfigError("uniforms_NT has numbers outside [0, 1)")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {index} is empty: a reply continues at least one token")
        if min(context - len(prompt), uniforms_NT.size(1)) < 1:
            raise ConfigError(
                f"prompt {index} of {len(prompt)} tokens leaves no room for a reply: context={context}, "
                f"at most {uniforms_NT.size(1)} new tokens"
            )
