"""Files and figures of `python -m data self-instruct`, and advice where the network makes nothing more."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.messages import format_count
from train.synthetic.filters import CUT_LIST, CUT_REPLY, EMPTY_REPLY, EQUAL, NO_LIST, NO_TEXT, SIMILAR
from train.synthetic.rounds import write_whole
from train.synthetic.self_instruct import Made

CONVERSATIONS, REJECTED, SUMMARY = "conversations.jsonl", "rejected.jsonl", "summary.json"
COPIES = "the network repeats what it knows: give more and more diverse seeds, raise --temperature or --top-p"
ADVICE = {
    NO_TEXT: "the network answers nothing: it may not be tuned to conversations, or with another template (--template, --ask)",
    NO_LIST: "the network writes no numbered lists: it may be too small, or not tuned to conversations (--ask)",
    CUT_LIST: "every list is cut inside its first instruction: raise --list-tokens",
    EQUAL: COPIES,
    SIMILAR: f"{COPIES}, or raise --overlap",
    EMPTY_REPLY: "the network answers its own instructions with nothing: it may be tuned with another template (--template)",
    CUT_REPLY: "replies do not end: raise --reply-tokens; or it is not tuned to stop, or with another template (--template)",
}
USUAL = "no instruction passes the filters: name a larger network, or one that is tuned to instructions"


def write_files(folder: Path, made: Made, count: int) -> list[dict]:
    """Write conversations (none: no file), rejections and the summary; return the records in use, the first `count`."""
    records = made.records[:count]
    conversations = [
        {
            "messages": [
                {"role": "user", "content": record["instruction"]},
                {"role": "assistant", "content": record["output"]},
            ],
            "request": record["request"],
        }
        for record in records
    ]
    for name, rows in ((CONVERSATIONS, conversations), (REJECTED, made.rejected)):
        if rows or name == REJECTED:
            write_whole(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            (folder / name).unlink(missing_ok=True)
    write_whole(folder / SUMMARY, json.dumps(summarize(made, count), indent=1, ensure_ascii=False) + "\n")
    return records


def summarize(made: Made, count: int) -> dict:
    """Return the figures of all finished rounds."""
    return {
        "wanted": count,
        "made": min(len(made.records), count),
        "is_complete": len(made.records) >= count,
        "beyond_wanted": max(len(made.records) - count, 0),  # in rounds.jsonl: of the last round
        "requests": made.requests,
        "requests_shortened": made.shortened,
        "rejected": dict(made.reasons.most_common()),
        "rouge_l_compared": made.compared,
        "rouge_l_skipped_by_length": made.skipped,
    }


def describe(made: Made, records: Sequence[dict]) -> list[str]:
    """Return lines for the terminal."""
    listed = len(made.records) + sum(each["reason"] not in (NO_LIST, NO_TEXT) for each in made.rejected)
    lines = [f"requests     {made.requests:,}, {format_count(listed, 'instruction')} in their lists"]
    if made.shortened:
        lines.append(f"shortened    {format_count(made.shortened, 'request')} with fewer examples, to fit the context")
    lines += [f"rejected     {number:,}: {reason}" for reason, number in made.reasons.most_common()]
    pairs = made.compared + made.skipped
    if pairs:
        by_length = f"{made.skipped:,} ({made.skipped / pairs:.0%})"
        lines.append(f"ROUGE-L      {pairs:,} comparisons, of which {by_length} decided by length")
    if records:
        words = [len(record["output"].split()) for record in records]
        sizes = f"replies of {min(words)} to {max(words)} words"
        lines.append(f"made         {format_count(len(records), 'conversation')}, {sizes}")
    return lines


def explain_stop(made: Made, count: int, patience: int, folder: Path) -> str:
    """Return the message where `patience` requests in a row gave nothing, with what to do by the most frequent reason."""
    recent = [each["reason"] for each in made.rejected if each["request"] >= made.requests - made.barren]
    # the last item of a list is cut wherever a network does not end: the other reasons say more
    reasons = sorted(set(recent), key=lambda reason: (reason == CUT_LIST, -recent.count(reason), reason))
    named = ", ".join(f"{recent.count(reason):,} {reason}" for reason in reasons)
    what = ADVICE.get(reasons[0], USUAL) if reasons else USUAL
    return (
        f"{made.barren:,} requests in a row gave nothing (--patience {patience}), and {min(len(made.records), count):,} of "
        f"{count:,} conversations are made. Rejected in these requests: {named} ({folder / REJECTED}). "
        f"{what[0].upper()}{what[1:]}. A larger --patience goes on"
    )
