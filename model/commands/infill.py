"""Fill in the middle for `python -m model generate --prefix TEXT --suffix TEXT`."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import ConfigError

if TYPE_CHECKING:
    from data.tokenizer.base import Tokenizer
    from model.config import ModelConfig


@dataclass(frozen=True)
class Gap:
    """A gap to fill: the texts on both sides, the ids after which the middle is generated, and the ids that end it."""

    prefix: str
    suffix: str
    ids: list[int]
    stop_ids: list[int]

    def room(self, max_new_tokens: int, context: int | None) -> int:
        """Return the most tokens of the middle: a window that slides would lose the gap. Errors: no room (ConfigError)."""
        if context is None:
            return max_new_tokens
        room = context - len(self.ids) + 1  # the last new token is never read
        if room < 1:
            raise ConfigError(f"--prefix and --suffix have {len(self.ids):,} tokens, and the context {context:,}: shorten them")
        if room < max_new_tokens:
            print(f"note: the middle has {room:,} tokens at most: the context has {context:,}", file=sys.stderr)
        return min(room, max_new_tokens)


def open_gap(prefix: str, suffix: str, config: "ModelConfig", tokenizer: "Tokenizer", order: str | None = None) -> Gap:
    """Return the gap of --prefix and --suffix in the format of the tokenizer; `order` is that of --infill-order.

    Errors: the tokenizer has no format (ConfigError), or the format no such order (DataError).
    """
    from data.transforms.fim import FORMATS, FillInMiddle, find_format
    from model.commands.opening import note_unknown

    name = find_format(tokenizer)
    if name is None:
        raise ConfigError(
            "--prefix and --suffix need a network that learned to fill gaps: this folder's tokenizer has the tokens of none of "
            f"the formats {', '.join(FORMATS)} (to train one: python -m train --objective fim)"
        )
    fim = FillInMiddle(tokenizer, name)
    try:
        ids = [*tokenizer.affixes.prefix, *fim.build_prompt(prefix, suffix, order)]
    except UnicodeEncodeError:
        raise ConfigError("--prefix or --suffix is not valid UTF-8") from None
    for option, text in (("--prefix", prefix), ("--suffix", suffix)):
        note_unknown(tokenizer, text, fim.encode(text), option=option)
    if config.bidirectional_prompt:
        raise ConfigError("--prefix and --suffix: this network was trained with --objective prefix, which fills no gaps")
    return Gap(prefix, suffix, tokenizer.check_ids(ids), [fim.end_id, *fim.ids.values()])
