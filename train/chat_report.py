"""Lines about conversations before the first step of a run."""

from collections.abc import Sequence

from data.chat.encode import ChatEncoder, Tokens
from data.chat.preview import describe_renderings, mark_learned
from data.messages import format_count, shorten_list
from data.tokenizer.base import Tokenizer

PREVIEWED = 200  # tokens of the first conversation


def describe_examples(
    encoder: ChatEncoder,
    learned: int,
    tokens: int,
    *,
    rewritten: Sequence[str],
    left_out: Sequence[str],
    cut: Sequence[str],
    turns: int,
    is_mute: bool,
) -> str:
    """Describe the template, how many of the tokens are learned, and what was done to records, by their names.

    rewritten: records with an example for each reply. turns: oldest turns that were dropped from those in `cut`.
    is_mute: no held-out record has a prompt whose reply fits.
    """
    template = encoder.template
    lines = [f"template {template.name}; {learned:,} of {tokens:,} tokens are learned ({learned / tokens:.1%})"]
    if rewritten and encoder.per_reply:
        lines.append(f"{format_count(len(rewritten), 'record')} of several replies: one example a reply")
    elif rewritten:
        lines.append(f"it rewrites history: {format_count(len(rewritten), 'record')} of several replies: one example a reply")
    lines += describe_renderings(encoder)
    if left_out:
        lines.append(f"longer than a row, left out: {shorten_list(left_out)}")
    if cut:
        dropped = f" ({format_count(turns, 'oldest turn')} dropped)" if turns else ""
        lines.append(f"longer than a row, cut{dropped}: {shorten_list(cut)}")
    if is_mute:
        lines.append("no held-out record has a prompt that leaves room for its reply: validation generates none")
    return "\n         ".join(lines) + "\n"


def preview_lines(name: str, tokenizer: Tokenizer, tokens: Tokens) -> str:
    """Return the text of an example with its learned tokens marked."""
    shown = mark_learned(tokenizer, tokens, most=PREVIEWED).rstrip("\n")
    return f"{name}, learned between ⟦ and ⟧ (python -m data preview shows more):\n{shown}\n"
