"""Export our SentencePiece models as tokenizer.json, so that transformers' AutoTokenizer opens a checkpoint."""

import json
from collections.abc import Mapping, Sequence

from sentencepiece import SentencePieceProcessor

from data.tokenizer.base import TOKENIZER_CONFIG, TOKENIZER_JSON, Affixes


def to_tokenizer_json(
    processor: SentencePieceProcessor,
    *,
    token_bytes: Sequence[bytes],
    affixes: Affixes,
    roles: Mapping[str, int | None],
    flags: Mapping[str, object],
    added: Mapping[str, int],
) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json of a lossless model, with the same ids, for U+2581 too.

    SentencePiece merges the adjacent pair whose union scores best, leftmost first; `tokenizers` ranks each pair. The pairs of
    one piece get consecutive ranks, in the order of scores. Pieces hold the space itself instead of U+2581: that character then
    has no piece and is spelled in bytes, as in our encoder. transformers' tokenizer recognizes special tokens written in the
    text, and adds the same affixes. Returns {} for a model that is no BPE, or has pieces that are matched before merging.
    roles: ids of bos, eos, unk, mask. flags: settings copied into tokenizer_config.json. added: further control tokens.
    """
    count = len(processor)
    ids, controls = {}, []
    for i in range(count):
        is_ordinary = not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        piece = processor.id_to_piece(i)
        ids[token_bytes[i].decode() if is_ordinary else piece] = i
        if not is_ordinary and not processor.is_byte(i):
            controls.append((i, piece))
    control_ids = {i for i, _ in controls}
    controls += [(i, name) for name, i in added.items()]
    scores = [processor.get_score(i) for i in ids.values() if not (i in control_ids or processor.is_byte(i))]
    if scores != [-rank for rank in range(len(scores))]:  # the scores of SentencePiece's BPE, and of nothing else
        return {}
    added_flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    affix_pieces = {id: processor.id_to_piece(id) for id in (*affixes.prefix, *affixes.suffix)}

    def template(sequence: str, type_id: int) -> list[dict]:
        prefix, suffix = ([{"SpecialToken": {"id": affix_pieces[id], "type_id": type_id}} for id in side] for side in affixes)
        return [*prefix, {"Sequence": {"id": sequence, "type_id": type_id}}, *suffix]

    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece} | added_flags | {"special": True} for i, piece in controls],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template("A", 0),
            "pair": template("A", 0) + template("B", 1),
            "special_tokens": {piece: {"id": piece, "ids": [id], "tokens": [piece]} for id, piece in affix_pieces.items()},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(roles["unk"]),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list_merges(ids, {i: processor.get_score(i) for i in ids.values()}),
        },
    }
    named = {f"{role}_token": processor.id_to_piece(i) for role, i in roles.items() if i is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named | dict(flags)
    return {
        TOKENIZER_JSON: json.dumps(spec, ensure_ascii=False).encode(),
        TOKENIZER_CONFIG: json.dumps(settings, indent=2).encode(),
    }


def list_merges(ids: dict[str, int], score: dict[int, float]) -> list[list[str]]:
    """Return every pair of pieces whose union is a piece: best union first, and within it the pair that is formed first.

    >>> list_merges({"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}, {0: 0, 1: 0, 2: -1, 3: -2, 4: -3})
    [['a', 'b'], ['b', 'a'], ['ab', 'a'], ['a', 'ba']]
    """
    found = []
    for piece, i in ids.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in ids and right in ids:
                worst = max(-score[ids[left]], -score[ids[right]])
                found.append(((-score[i], i, worst), [left, right]))
    return [pair for _, pair in sorted(found)]
