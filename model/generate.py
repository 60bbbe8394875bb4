"""Text generation by sampling or greedy decoding: choose the next token, append it, repeat."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.cache import Cache
from model.constraints import Constraints
from model.decoding import Decoding, eval_mode, seen_tokens
from model.sampling import Sampling
from model.stopping import Stop


def generate(
    network: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    constraints: Constraints | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    cache: Cache | None = None,
) -> Tensor:
    """Continue each row of input_ids (B T, left-padded where attention_mask is 0); returns the new tokens alone, B N.

    An encoder-decoder reads input_ids (padded on either side) and generates a separate text. Sampling: `model.sampling`;
    temperature 0 is greedy. A row ends with eos_id or one of stop_ids, or when the text of its new tokens, by `decode`,
    contains one of stop_strings, wherever in a token that begins or ends. After its end a row is filled with the config's
    pad_id, else its eos_id or first stop id, else 0; the loop ends when all rows have ended. constraints: forced and forbidden
    ids. on_token(token_B) is called with each step's tokens. cache: one with the first tokens of input_ids, which are then not
    read again (`model.chat_session`). Beyond the network's context the window slides (`model.decoding`). Errors: a setting out
    of range, or a network that generates no text (ConfigError).
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stop = Stop(eos_id, stop_ids, stop_strings, decode)
    with eval_mode(network):
        text = Decoding(network, input_ids, attention_mask, max_new_tokens=max_new_tokens, use_cache=use_cache, cache=cache)
        fill = stop.fill(network.config.pad_id)
        seen_BV = seen_tokens(text, network.config.vocab_size) if repetition_penalty != 1 else None
        done_B = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        for left in range(max_new_tokens, 0, -1):
            logits_BV = text.next_logits()
            if constraints is not None:
                logits_BV = constraints.apply(logits_BV, text, stop.ids, last=left == 1)
            token_B = sampling.choose(logits_BV, seen_BV, generator)
            if stop.is_active:
                token_B = token_B.masked_fill(done_B, fill)
            text.append(token_B)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            if on_token is not None:
                on_token(token_B)
            if stop.is_active:
                done_B |= stop.has_ended(text.new_BT)
                if done_B.all():
                    break
        new_BN = text.new_BT
    return new_BN.clone()  # cloned outside inference mode, so that training may use it
