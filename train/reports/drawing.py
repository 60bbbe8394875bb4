"""Draw an example: the token at each position over the label that it is trained on, as the objective made them."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from data.tokenizer.base import Tokenizer
from data.transforms.causal import IGNORE

WIDTH, LINES = 110, 2  # columns of a drawing; lines of tokens that are shown of a long example
UNSCORED, SPACE, NEWLINE = "·", "▁", "⏎"
Column = tuple[str, ...]


def draw_example(batch: Mapping[str, Tensor], tokenizer: Tokenizer, row: int = 0, names: Sequence[str] = ()) -> str:
    """Return the drawing of one row of a batch.

        input, label      the token at each position over its label: labels[t] is the target of position t, · where unscored
        source            the encoder's input, of an encoder-decoder; input is then the decoder's
        any other key     its values, one a position, or those of the whole text

    A space is shown as ▁, a newline as ⏎, padding is left out. `names`: those of class labels; else a label is a token.
    """
    has_source = "decoder_input_ids" in batch
    ids_T = batch["decoder_input_ids" if has_source else "input_ids"][row]
    source_S = batch["input_ids"][row] if has_source else None
    size = _length(batch, row, has_source)
    lines = [] if source_S is None else list(_lines({"source": _tokens(source_S[: _source_length(batch, row)], tokenizer)}))
    columns, rest = {"input": _tokens(ids_T[:size], tokenizer)}, []
    hidden = {"input_ids", "decoder_input_ids", "attention_mask", "position_ids", "decoder_position_ids", "group", "groups"}
    for key, value in batch.items():
        if key in hidden or (has_source and value.shape[1:] == batch["input_ids"].shape[1:] and key == "document_ids"):
            continue
        if value.dim() == 2 and value.shape[1:] == ids_T.shape:
            cells = value[row, :size]
            shown = _labels(cells, tokenizer, names) if key == "labels" else [str(each) for each in cells.tolist()]
            if key != "labels" and len(set(shown)) == 1:
                continue  # one document, or one token type: nothing to see
            columns["label" if key == "labels" else _short(key)] = shown
        elif key == "labels" and value.dim() == 1:
            rest.append(f"label     {_label(value[row].item(), names)}")
        else:
            rest.append(f"{_short(key):9} {value[row].tolist()}")
    return "\n".join([*lines, *_lines(columns), *rest])


def _short(key: str) -> str:
    return key.removeprefix("decoder_").removeprefix("token_").removesuffix("_ids")


def _length(batch: Mapping[str, Tensor], row: int, has_source: bool) -> int:
    """Return the number of positions without the padding at the end."""
    ids = batch["decoder_input_ids" if has_source else "input_ids"][row]
    if not has_source and "attention_mask" in batch:
        return int(batch["attention_mask"][row].sum())
    labels = batch["labels"]
    if has_source and labels.shape == batch["decoder_input_ids"].shape:  # the decoder's padding follows its last label
        return int((labels[row] != IGNORE).nonzero().max()) + 1 if (labels[row] != IGNORE).any() else len(ids)
    return len(ids)


def _source_length(batch: Mapping[str, Tensor], row: int) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"][row].sum())
    return batch["input_ids"].size(1)


def _tokens(ids_T: Tensor, tokenizer: Tokenizer) -> list[str]:
    return [_token(id, tokenizer) for id in ids_T.tolist()]


def _token(id: int, tokenizer: Tokenizer) -> str:
    if id in tokenizer.special_ids:
        return tokenizer.token_name(id)
    text = tokenizer.token_bytes[id].decode(errors="replace")
    return text.replace(" ", SPACE).replace("\n", NEWLINE) or f"id {id}"


def _labels(labels_T: Tensor, tokenizer: Tokenizer, names: Sequence[str]) -> list[str]:
    return [UNSCORED if id == IGNORE else _label(id, names) if names else _token(id, tokenizer) for id in labels_T.tolist()]


def _label(value: float, names: Sequence[str]) -> str:
    return names[int(value)] if names and isinstance(value, int) else f"{value:g}"


def _lines(columns: dict[str, list[str]]) -> Iterator[str]:
    """Yield the rows of `columns` side by side, broken at WIDTH; after LINES of them an ellipsis."""
    total, start = len(next(iter(columns.values()))), 0
    for number in range(LINES):
        width, end = 10, start
        while end < total:
            wide = max(len(cells[end]) for cells in columns.values()) + 1
            if width + wide > WIDTH and end > start:
                break
            width, end = width + wide, end + 1
        is_cut = number == LINES - 1 and end < total
        for name, cells in columns.items():
            wides = [max(len(each[t]) for each in columns.values()) for t in range(start, end)]
            line = " ".join(cell.ljust(wide) for cell, wide in zip(cells[start:end], wides, strict=True)).rstrip()
            yield f"{name if start == 0 or len(columns) > 1 else '':9} {line}{' …' * is_cut}".rstrip()
        start = end
        if start >= total:
            return
