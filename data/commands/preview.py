"""`python -m data preview FILE`: which tokens of conversations are learned."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from data.config import DataConfig, DataError
from data.messages import format_count, shorten_list
from train.command_line import Needs


@dataclass(frozen=True)
class Preview:
    """Show the first conversations of files as a network reads them, the learned tokens between ⟦ and ⟧, or in colour in a
    terminal; then count learned tokens, and the records that --overlong drops or cuts. The options are those of --objective
    sft."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of conversations: .jsonl .json .csv .tsv .parquet; each also .gz."""
    tokenizer: Path
    """The folder of a tokenizer: a run, or a model folder."""
    template: str | None = None
    """A chat template: ours by its name, or one of the folder's. Default: the folder's own, else chatml."""
    variables: tuple[str, ...] = ()
    """NAME=JSON …: further variables of the template (enable_thinking=false)."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Learn all replies, the last one of each conversation, or every token of it."""
    per_reply: bool = False
    """Make an example of each reply, though the template needs none."""
    context: int | None = None
    """Tokens of a row. Default: without limit."""
    overlong: Literal["error", "cut", "drop"] = "cut"
    """A longer conversation: stop; drop its oldest turns, then cut the end of its reply; or leave it out."""
    leading_reply: Literal["refuse", "drop"] = "refuse"
    """A conversation that begins with a reply: stop, or drop that reply."""
    count: int = 3
    """Conversations to show."""
    tokens: int = 2000
    """Maximal tokens to show of each."""
    colour: Literal["auto", "on", "off"] = "auto"
    """Mark learned tokens in colour; auto: in a terminal."""

    NEEDS: ClassVar = (
        Needs(("overlong",), lambda options: options.context is not None, "without --context no conversation is too long"),
    )

    def __post_init__(self) -> None:
        for name in ("count", "tokens", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.files:
            raise DataError("name a file of conversations")


def tokenizer_folder(path: Path) -> Path:
    """Return the folder of a tokenizer: the path itself, a file too; else that of a run's checkpoint."""
    from data.tokenizer.open import READERS
    from train.runs.open import resolve

    return path if path.is_file() or any((path / name).is_file() for name in READERS) else resolve(path)


def preview(options: Preview) -> None:
    from data.chat.conversation import has_dropped_turns
    from data.chat.encode import ChatEncoder
    from data.chat.overlong import fit
    from data.chat.preview import describe_renderings, mark_learned
    from data.chat.shapes import describe_shape, read_chat_record
    from data.chat.variables import parse_variables
    from data.sources.records import read_corpus_rows
    from data.tokenizer.open import load_tokenizer
    from train.chat_data import open_chat_tokenizer

    def note(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    tokenizer, template, _ = open_chat_tokenizer(options.template, load_tokenizer(tokenizer_folder(options.tokenizer)), note)
    rows = read_corpus_rows(DataConfig(corpus=options.files), [], note)
    variables = parse_variables(options.variables, template)
    choices = {"learn": options.learn, "per_reply": options.per_reply, "variables": variables}
    encoder, most = ChatEncoder(tokenizer, template, **choices), options.context or sys.maxsize
    colour = options.colour == "on" or (options.colour == "auto" and sys.stdout.isatty())
    lengths: list[int] = []
    learned, shown = 0, 0
    leading, dropped, cut, several, shapes = [], [], [], [], {}
    for name, row in zip(rows.names, rows.values, strict=True):
        try:
            record = read_chat_record(row, leading_reply=options.leading_reply)
            fitted = fit(encoder, record, most, options.overlong)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        shape = describe_shape(row)
        shapes[shape] = shapes.get(shape, 0) + 1
        leading += [name] * has_dropped_turns(record)
        dropped += [name] * fitted.is_dropped
        cut += [name] * bool(fitted.turns or fitted.tokens)
        several += [name] * (len(fitted.examples) > 1)
        for number, tokens in enumerate(fitted.examples, 1):
            lengths.append(len(tokens.ids))
            learned += tokens.learned_count
            if shown < options.count:
                part = f", reply {number} of {len(fitted.examples)}" if len(fitted.examples) > 1 else ""
                of = f"{tokens.learned_count:,} of {format_count(len(tokens.ids), 'token')} learned"
                print(f"---- {name}{part}: {of}")
                print(mark_learned(tokenizer, tokens, colour=colour, most=options.tokens))
        shown += bool(fitted.examples)
    print("----")
    print(f"template   {template.name}")
    print("records    " + ", ".join(f"{count:,} of {shape}" for shape, count in shapes.items()))
    total = sum(lengths)
    if lengths:
        sizes = f"{min(lengths):,} to {max(lengths):,} tokens, {total / len(lengths):,.0f} on average"
        print(f"examples   {len(lengths):,} of {sizes}")
        print(f"learned    {learned:,} of {total:,} tokens ({learned / total:.1%})")
    for line in describe_renderings(encoder):
        print(f"template   {line}")
    if several:
        print(f"rewritten  the template rewrites history: {format_count(len(several), 'record')} one example a reply")
    if leading:
        print(f"left out   turns before the first user's: {format_count(len(leading), 'record')}, {shorten_list(leading)}")
    if dropped:
        print(f"left out   longer than {most:,} tokens: {format_count(len(dropped), 'record')}, {shorten_list(dropped)}")
    if cut:
        print(f"cut        longer than {most:,} tokens: {format_count(len(cut), 'record')}, {shorten_list(cut)}")
