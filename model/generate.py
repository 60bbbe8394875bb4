"""Text out: choose the next token, append it, go on."""

import torch
from torch import Tensor, nn

from model.cache import Cache
from model.config import ConfigError


def filter_logits(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Divide by the temperature, then keep the k best, then the nucleus; all else becomes -inf.

    The nucleus is the smallest set of best tokens whose probabilities reach p: a token stays while the mass *before*
    it is below p, so the best token always stays. Ties at the k-th place all stay. As in transformers.
    Source: Holtzman et al. 2019, arXiv 1904.09751 (top-p); Fan et al. 2018, arXiv 1805.04833 (top-k).

    >>> filter_logits(torch.tensor([[2.0, 1.0, 0.0]]), temperature=1.0, top_k=2, top_p=None).tolist()
    [[2.0, 1.0, -inf]]
    """
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.size(-1):
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        probability_BV = sorted_BV.softmax(-1)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        drop_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    return logits_BV


@torch.no_grad()
def generate(
    network: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of input_ids (B T, left-padded where attention_mask is 0); returns the new tokens alone.

    temperature 0 takes the best token. After eos_id a row is filled with it; all rows at their end stop the loop.
    Past the network's context the window slides: the last half of it is read again, and generation goes on from there.
    """
    _check(temperature, top_k, top_p, max_new_tokens, input_ids, attention_mask)
    config, context = network.config, network.config.context
    was_training = network.training
    network.eval()
    ids_BT = input_ids[:, -context:]
    mask_BT = torch.ones_like(ids_BT) if attention_mask is None else attention_mask[:, -context:]
    padded = bool((mask_BT == 0).any())
    new: list[Tensor] = []
    done_B = torch.zeros(ids_BT.size(0), dtype=torch.bool, device=ids_BT.device)
    cache, unread = None, ids_BT
    try:
        for _ in range(max_new_tokens):
            if ids_BT.size(1) > context:  # slide: halve what is read, so that this happens once in context / 2 tokens
                ids_BT, mask_BT = ids_BT[:, -(context // 2 or 1) :], mask_BT[:, -(context // 2 or 1) :]
                cache, unread = None, ids_BT
            if cache is None and use_cache:
                weight = network.head.weight
                cache = Cache(config, ids_BT.size(0), context, weight.dtype, weight.device)
            hidden_BTD = network.body(unread, mask_BT if padded else None, cache=cache).hidden
            logits_BV = network.head(hidden_BTD[:, -1])
            token_B = _choose(logits_BV, temperature, top_k, top_p, generator)
            if eos_id is not None:
                token_B = torch.where(done_B, eos_id, token_B)
                done_B |= token_B == eos_id
            new.append(token_B)
            if done_B.all():
                break
            ids_BT = torch.cat((ids_BT, token_B[:, None]), dim=1)
            mask_BT = torch.cat((mask_BT, torch.ones_like(mask_BT[:, :1])), dim=1)
            unread = token_B[:, None] if use_cache else ids_BT
    finally:
        network.train(was_training)
    return torch.stack(new, dim=1) if new else ids_BT.new_zeros(ids_BT.size(0), 0)


def _choose(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = filter_logits(logits_BV.float(), temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probability_BV, 1, generator=generator)[:, 0]


def _check(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    max_new_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
) -> None:
    if not temperature >= 0:  # so that NaN is refused too
        raise ConfigError(f"temperature={temperature} must be 0 (take the best token) or above")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is not in (0, 1]")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must not be negative")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ConfigError(f"attention_mask of shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    if input_ids.ndim != 2 or input_ids.size(1) == 0:
        raise ConfigError(f"input_ids of shape {tuple(input_ids.shape)}: expected (batch, at least one token)")
