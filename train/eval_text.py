"""A further text of a token objective (--eval-corpus): its batches, scores and introduction."""

from typing import TYPE_CHECKING

from data.config import DataError
from data.corpus.eval_text import PASSAGE, EvalText, count_shared, count_shared_passages, read_eval_text
from data.messages import format_count
from data.notes import format_percent
from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE
from train.evaluate import bits_per_byte
from train.task import Batch, EvalCorpus, Info, Scores, Task, Totals

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data.sources.shards import Shards
    from train.objective import Objective
    from train.parallel.ranks import Ranks

MOST = 1 << 26  # training tokens that are searched for passages, at 0.3 µs a token
FAR_MORE = 1.5  # times the tokens a byte of the training text: the tokenizer was made for other text


class ScoredText:
    """Text that is scored by the loss of a run, in batches of the task's own validation.

    has_bits: the loss is that of all the text's tokens in turn, so that bits per byte are known.
    """

    validation_sources = ()

    def __init__(self, text: EvalText, batches: list[Batch], *, has_bits: bool):
        self.text, self.validation, self.has_bits = text, batches, has_bits

    def scores(self, totals: Totals) -> Scores:
        """Return the loss in nats a target; and bits per byte, which compare between tokenizers."""
        nats, count = totals["loss"]
        bits = {"bits_per_byte": bits_per_byte(nats, self.text.bytes)} if self.has_bits else {}
        return {"loss": nats / count, **bits}

    def score_line(self, scores: Scores) -> str:
        bits = f", {scores['bits_per_byte']:.3f} bits per byte" if self.has_bits else ""
        return f"loss {scores['loss']:.4f}{bits}"

    def scoring(self, objective: "Objective") -> "Objective":
        return objective

    def generation_totals(self, network: "nn.Module", device: "torch.device", ranks: "Ranks") -> Totals:
        return {}


def open_text(task: Task, shards: "Shards", name: str, paths: tuple[str, ...], info: Info) -> EvalCorpus:
    """Open a text of --eval-corpus. Errors: DataError for text without a target."""
    config, tokenizer = task.config, task.tokenizer
    text = read_eval_text(config.data, paths, tokenizer, config.report.eval_tokens, info)
    batches = task.eval_batches(text.ids)
    if not any((batch["labels"] != IGNORE).any() for batch in batches):
        raise DataError(f"none of its {format_count(text.tokens, 'token')} is a target of --objective {config.run.objective}")
    scored = ScoredText(text, batches, has_bits=task.has_bits_per_byte)
    return EvalCorpus(name, scored, describe(text, shards, tokenizer, scored.has_bits), text.sha256)


def describe(text: EvalText, shards: "Shards", tokenizer: Tokenizer, has_bits: bool) -> str:
    """Describe a text: its size, what of it is trained on too, and a tokenizer that does not fit it."""
    some = f" of {text.all_documents:,}" if text.documents < text.all_documents else ""
    line = (
        f"{text.documents:,}{some} {'document' if text.documents == 1 and not some else 'documents'}, "
        f"{format_count(text.tokens, 'token')}, {text.bytes:,} bytes"
    )
    if shared := count_shared(text, shards.train.ids, tokenizer.bos_id):
        line += f"; {shared:,} of these {'is' if shared == 1 else 'are'} trained on too"
    passages, of_all = count_shared_passages(text.ids, shards.train.ids[:MOST])
    if passages:
        of_first = f"first {MOST:,} tokens of the " if shards.train.tokens > MOST else ""
        line += f"; {format_percent(passages, of_all)} of its passages of {PASSAGE} tokens are in the {of_first}training text"
    own = (shards.train.targets, shards.train.bytes, shards.report["unknown"])
    return line + misfit((text.tokens, text.bytes, text.unknown), own, has_bits=has_bits)


def misfit(here: tuple[int, int, int], own: tuple[int, int, int], *, has_bits: bool = False) -> str:
    """Describe text that the tokenizer was not made for; "" where it fits.

    here, own: (tokens, bytes, unknown tokens) of the text, and of what is trained on.

    >>> misfit((100, 300, 0), (1000, 3300, 0)), misfit((300, 300, 3), (1000, 3300, 0)).split()[:4]
    ('', ['1.000', 'tokens', 'a', 'byte,'])
    """
    notes, rates = [], [tokens / max(1, size) for tokens, size, _ in (here, own)]
    if rates[0] > FAR_MORE * rates[1]:
        compares = "bits per byte do" if has_bits else "only with the same text and tokenizer"
        rate = f"{rates[0]:.3f} tokens a byte, and {rates[1]:.3f} of the training text"
        notes.append(f"{rate}: its loss a token does not compare, {compares}")
    shares = [format_percent(unknown, max(1, tokens)) if unknown else "none" for tokens, _, unknown in (here, own)]
    if here[2]:
        notes.append(f"{shares[0]} of its tokens are unknown, and {shares[1]} of the training text's")
    return "".join(f"\n         {note}" for note in notes)
