"""`python -m data self-instruct MODEL --seeds FILE --out FOLDER`: instructions and replies that a network writes itself."""

import hashlib
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from data.config import DataConfig, DataError
from data.messages import format_count
from train.command_line import Needs
from train.synthetic.settings import SelfInstructSettings


@dataclass(frozen=True, kw_only=True)
class SelfInstruct(SelfInstructSettings):
    """Let a network write instructions like the seeds, and replies to them (Self-Instruct, Wang et al. 2023).

    FOLDER gets conversations.jsonl, which --objective sft reads; rejected.jsonl, each with its reason; summary.json. A command
    that was killed goes on when it is given again, and writes the same files as one that was not.
    """

    model: tyro.conf.Positional[Path]
    """A run, a model folder, or a run or folder of an adapter."""
    seeds: tuple[str, ...]
    """Files of seed instructions: {"instruction", "input"?, "output"?}, or conversations, of which the first turn is one."""
    out: Path
    """The folder to write; or one that this command has begun."""
    count: int = 100
    """Conversations to make. A folder can be given a larger number later."""
    patience: int = 64
    """Stop after so many requests in a row that gave nothing."""
    ask: Literal["auto", "chat", "text"] = "auto"
    """Ask for a list in a message (chat), or let the network continue one as text. auto: chat where it has a chat template."""
    template: str | None = None
    """The chat template of replies: one of ours by its name, or one of the folder's. Default: the folder's own, else alpaca."""
    base: Path | None = None
    """For an adapter: its base, if that has moved since training."""
    device: str = "cpu"
    """cpu, cuda, …"""

    NEEDS: ClassVar = (
        Needs(("top_p",), lambda options: options.temperature > 0, "--temperature 0 always takes the best token"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "patience"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name} {getattr(self, name)}: must be at least 1")


def self_instruct(options: SelfInstruct) -> None:
    from tqdm import tqdm

    from data.commands.writing_network import TEXT_TEMPLATE, hash_folder, open_writing
    from train.runs.lock import locked
    from train.synthetic.report import CONVERSATIONS, describe, explain_stop, write_files
    from train.synthetic.rounds import RoundLog, claim_folder
    from train.synthetic.self_instruct import Made
    from train.synthetic.self_instruct import self_instruct as write_instructions
    from train.synthetic.writer import NetworkWriter

    seeds = read_seeds(options.seeds, options.examples)
    where = {"base": options.base, "template": options.template, "device": options.device}
    opened = open_writing(options.model, **where, usual=TEXT_TEMPLATE)
    is_chat = opened.has_own_template if options.ask == "auto" else options.ask == "chat"
    settings = SelfInstructSettings(**{each.name: getattr(options, each.name) for each in fields(SelfInstructSettings)})
    identity = {"command": "self-instruct", **asdict(settings), "ask": "chat" if is_chat else "text"}
    identity |= {"template_sha256": hash_text(opened.template.source), "seeds_sha256": hash_text("\0".join(seeds))}
    base = opened.folder if opened.network.source is None else Path(opened.network.source)  # of an adapter: another folder
    identity["model_sha256"] = [hash_folder(each) for each in dict.fromkeys((opened.folder.resolve(), base.resolve()))]
    claim_folder(options.out, identity)
    print(f"seeds        {format_count(len(seeds), 'instruction')}")
    print(f"asks         {'in messages' if is_chat else 'as text'}; replies by the template {opened.template.name}")
    writer = NetworkWriter(
        opened.network, opened.tokenizer, opened.template, settings, stop_ids=opened.stop_ids, is_chat=is_chat
    )
    with locked(options.out):
        log = RoundLog(options.out)
        if log.rounds:
            print(f"goes on      behind {format_count(len(log.rounds), 'finished round')}")
        with tqdm(total=options.count, unit="", desc="made", disable=not sys.stderr.isatty(), leave=False) as bar:

            def show(made: Made) -> None:
                bar.n = min(len(made.records), options.count)
                bar.set_postfix(requests=made.requests, rejected=len(made.rejected))

            limits = {"count": options.count, "patience": options.patience}
            made = write_instructions(seeds, writer, settings, log, **limits, on_round=show)
        records = write_files(options.out, made, options.count)
    for line in describe(made, records):
        print(line)
    if len(records) < options.count:
        raise DataError(explain_stop(made, options.count, options.patience, options.out))
    print(f"wrote        {options.out / CONVERSATIONS}")


def read_seeds(paths: tuple[str, ...], needed: int) -> list[str]:
    """Return the seed instructions of files, each once. A record that is none is named in a note.

    Errors (DataError): none parses, with the first reason; fewer than a request needs.
    """
    from data.sources.records import read_corpus_rows
    from train.synthetic.examples import read_instruction

    def note(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    rows = read_corpus_rows(DataConfig(corpus=paths), [], note, option="--seeds")
    found, refused = [], []
    for name, row in zip(rows.names, rows.values, strict=True):
        try:
            found.append(read_instruction(row))
        except DataError as error:
            refused.append(f"{name}: {error}")
    names, of = " ".join(paths), format_count(len(rows), "record")
    if not found:
        raise DataError(f"--seeds {names}: no instruction in {of}; the first: {refused[0]}")
    if refused:
        note(f"{len(refused):,} of {of} are no seed instructions and are left out; the first: {refused[0]}")
    seeds = list(dict.fromkeys(found))
    if len(seeds) < needed:
        raise DataError(
            f"--seeds {names}: {format_count(len(seeds), 'different instruction')}, and a request needs {needed} "
            "(--seed-examples plus --made-examples, which are seeds at first): give more seeds, or make these smaller"
        )
    return seeds


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
