"""Lines for the user about text that was skipped, repaired or not encodable, one for each kind that occurred."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data.messages import format_count, shorten_list

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer


def describe_reading(report: Mapping[str, Any]) -> list[str]:
    """Return lines about skipped and repaired documents. `report`: the fields of `data.sources.files.ReadReport`."""
    lines = []
    for names, what in ((report["skipped"], "left out"), (report["replaced"], "mended with U+FFFD")):
        if names:
            lines.append(f"{format_count(len(names), 'document')} of bad text {what}: {shorten_list(names)}")
    if report["empty"]:
        lines.append(f"{format_count(report['empty'], 'empty document')} left out")
    if report["without_records"]:
        lines.append(f"no record in {shorten_list(report['without_records'])}")
    if report["no_records"]:
        lines.append(f"left out, as no list of records: {shorten_list(report['no_records'])}")
    return lines


def describe_spelling(report: Mapping[str, Any], tokenizer: "Tokenizer") -> list[str]:
    """Return lines about text that a tokenizer dropped or encoded as unknown.

    report: "unspelled", documents without any token; of the others "tokens", without bos and eos, and how many are "unknown".
    """
    lines = []
    if report["unspelled"]:
        lines.append(f"{format_count(report['unspelled'], 'document')} left out: this tokenizer drops all of the text")
    return lines + describe_unknown(report["unknown"], report["tokens"], tokenizer)


def describe_unknown(unknown: int, tokens: int, tokenizer: "Tokenizer", what: str = "the tokens") -> list[str]:
    """Return a line about unknown tokens and their share; no line where there are none."""
    if not unknown:
        return []
    name = tokenizer.token_name(tokenizer.unknown_id)
    return [
        f"{format_percent(unknown, tokens)} of {what} ({unknown:,} of {tokens:,}) are the unknown token ({name}), whatever "
        "the text is: use a tokenizer that supports its script"
    ]


def format_percent(part: int, whole: int) -> str:
    """Return a share in percent.

    >>> format_percent(79, 1000), format_percent(1, 100_000), format_percent(3, 3)
    ('7.9 %', 'less than 0.1 %', '100.0 %')
    """
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent >= 0.1 else "less than 0.1 %"


def unknown_words(text: str, tokenizer: "Tokenizer", most: int = 3) -> list[str]:
    """Return the first words of a text, split at white space, that encode to an unknown token."""
    found = []
    for word in dict.fromkeys(text.split()):
        if len(found) < most and tokenizer.unknown_id in tokenizer.encode(word):
            found.append(word)
    return found
