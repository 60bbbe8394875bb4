"""Beam search: continue the k most probable texts together, and return the best that have ended."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.constraints import Constraints
from model.decoding import Decoding, eval_mode, seen_tokens
from model.sampling import penalize
from model.stopping import Stop


class Beams(NamedTuple):
    """The result of a beam search: the best texts of each input, best first."""

    tokens: Tensor  # B R N: the new tokens of R texts, padded as by `generate`
    scores: Tensor  # B R: log p(text) / length^penalty


class Finished:
    """The k best ended texts of one input: score = log p(text) / length^penalty, length without the prompt.

    `is_closed`: no later text can enter, as k have ended (early stopping), or by transformers' rule, as even the best running
    text, ended now, would not score above the worst of the k. With a penalty above 0 a longer text might: a heuristic.
    """

    def __init__(self, beams: int, length_penalty: float, early_stopping: bool):
        self.beams, self.length_penalty, self.early_stopping = beams, length_penalty, early_stopping
        self.texts: list[tuple[float, list[int]]] = []
        self.is_closed = False

    def score(self, log_probability: float, length: int) -> float:
        """Return the length-normalized score."""
        return log_probability / length**self.length_penalty

    def add(self, log_probability: float, tokens: list[int]) -> None:
        """Add an ended text, and drop the worst above k."""
        self.texts.append((self.score(log_probability, len(tokens)), tokens))
        self.texts.sort(key=lambda text: text[0], reverse=True)
        del self.texts[self.beams :]

    def close_if_settled(self, best_running: float, length: int) -> None:
        """Set `is_closed` where the best running text cannot enter."""
        if len(self.texts) == self.beams:
            worst = self.texts[-1][0]
            self.is_closed |= self.early_stopping or self.score(best_running, length) <= worst


def beam_search(
    network: nn.Module,
    input_ids: Tensor,
    *,
    beams: int,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    constraints: Constraints | None = None,
    num_return: int = 1,
    use_cache: bool = True,
) -> Beams:
    """Return the `num_return` best texts of each input (as for `generate`) by a search with k = `beams` running texts.

    At each step the k running texts have k · V continuations. Of the best 2k (more with several stop ids), those that stop
    leave, and are kept if among the best k; the best k of the others continue. At max_new_tokens all stop. length_penalty
    above 0 favours long texts. repetition_penalty and constraints act on log-probabilities, not on logits. Equal to
    transformers' `generate(num_beams=k, do_sample=False)`. Errors: a setting out of range (ConfigError).
    Source: Graves 2012, arXiv 1211.3711, section 2.5; the length penalty as in Sutskever et al. 2014, arXiv 1409.3215, and
    Wu et al. 2016, arXiv 1609.08144, section 7, of whose formula transformers has the power.
    """
    if beams < 1 or not 1 <= num_return <= beams:
        raise ConfigError(f"beams={beams} must be at least 1, num_return={num_return} from 1 to that")
    if not repetition_penalty > 0:
        raise ConfigError(f"repetition_penalty={repetition_penalty} must be above 0 (1: none)")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: a beam search needs at least 1")
    stop = Stop(eos_id, stop_ids)
    rows, vocab_size, device = input_ids.size(0), network.config.vocab_size, input_ids.device
    options = {"max_new_tokens": max_new_tokens, "use_cache": use_cache, "copies": beams}
    finished = [Finished(beams, length_penalty, early_stopping) for _ in range(rows)]
    width = min(max(2, 1 + len(stop.ids)) * beams, beams * vocab_size)  # enough continue, even if every text may stop
    with eval_mode(network):
        text = Decoding(network, input_ids, attention_mask, **options)
        first_B1 = torch.arange(rows, device=device)[:, None] * beams  # each input's first row in the batch
        running_Bk = torch.full((rows, beams), -torch.inf, device=device)
        running_Bk[:, 0] = 0  # the beams of an input begin as copies: only one counts
        for length in range(1, max_new_tokens + 1):
            logits_NV = text.next_logits()  # N = B k
            log_p_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
            if repetition_penalty != 1:
                log_p_NV = penalize(log_p_NV, seen_tokens(text, vocab_size), repetition_penalty)
            if constraints is not None:
                log_p_NV = constraints.apply(log_p_NV, text, stop.ids, last=length == max_new_tokens)
            total_BkV = running_Bk[..., None] + log_p_NV.unflatten(0, (rows, beams))
            best_BC, place_BC = total_BkV.flatten(1).topk(width)  # C candidates, best first
            beam_BC, token_BC = place_BC // vocab_size, place_BC % vocab_size
            stops_BC = stop.is_stop(token_BC) | (length == max_new_tokens)
            _finish(finished, text.new_BT, first_B1, best_BC, beam_BC, token_BC, stops_BC, beams)

            running_Bk, choice_Bk = best_BC.masked_fill(stops_BC, -torch.inf).topk(beams)
            text.reorder((first_B1 + beam_BC.gather(1, choice_Bk)).flatten())
            text.append(token_BC.gather(1, choice_Bk).flatten())
            for one, best_running in zip(finished, running_Bk[:, 0].tolist(), strict=True):
                one.close_if_settled(best_running, length)
            if all(one.is_closed for one in finished):
                break
    return _best(finished, num_return, stop.fill(network.config.pad_id), device)


def _finish(
    finished: list[Finished],
    new_BT: Tensor,
    first_B1: Tensor,
    best_BC: Tensor,
    beam_BC: Tensor,
    token_BC: Tensor,
    stops_BC: Tensor,
    beams: int,
) -> None:
    """Add the texts that stop among the best k candidates to the finished ones."""
    best, token = best_BC.tolist(), token_BC.tolist()
    source = (first_B1 + beam_BC).tolist()
    for b, c in stops_BC[:, :beams].nonzero().tolist():
        if not finished[b].is_closed:
            finished[b].add(best[b][c], [*new_BT[source[b][c]].tolist(), token[b][c]])


def _best(finished: list[Finished], num_return: int, fill: int, device: torch.device) -> Beams:
    """Collect the best texts of all inputs, padded with `fill`."""
    texts = [one.texts[:num_return] for one in finished]
    longest = max(len(tokens) for row in texts for _, tokens in row)
    tokens = [[[*tokens, *[fill] * (longest - len(tokens))] for _, tokens in row] for row in texts]
    scores = [[score for score, _ in row] for row in texts]
    return Beams(torch.tensor(tokens, device=device), torch.tensor(scores, device=device))
