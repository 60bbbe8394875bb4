"""`python -m data prepare`: build the shards of a corpus and print what they hold."""

import sys

import tyro

from data.config import DataConfig, DataError


def prepare(config: DataConfig) -> None:
    """Read, deduplicate, split and tokenize a corpus into shards that training maps into memory."""
    from data import shards  # here: --help must not wait for numpy

    made = shards.prepare(config, say=print, progress=sys.stderr.isatty())
    report = made.report
    print(f"{'':12}{'documents':>12}{'bytes':>14}{'tokens':>14}{'bytes/token':>14}")
    for name in shards.SPLITS:
        part = getattr(made, name)
        per_token = part.bytes / (part.tokens - 2 * part.documents)
        print(f"{name:12}{part.documents:12,}{part.bytes:14,}{part.tokens:14,}{per_token:14.3f}")
    print(f"read         {report['documents']:,} documents, {report['bytes']:,} bytes")
    print(f"dropped      {len(report['exact_duplicates'])} exact and {len(report['near_duplicates'])} near duplicates")
    print(f"tokenizer    {made.tokenizer.vocab_size:,} ids")
    print(f"{'built' if made.built else 'reused':13}{made.folder}")


def main() -> int:
    command = tyro.extras.SubcommandApp()
    command.command(name="prepare")(prepare)
    try:
        command.cli(prog="python -m data", description="Text in, batches out.", config=(tyro.conf.OmitArgPrefixes,))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    sys.exit(main())
