"""Our SentencePiece tokenizers as tokenizer.json, so that transformers' AutoTokenizer opens a checkpoint."""

import json
from typing import TYPE_CHECKING

from data.tokenizer.base import JSON, SIDE_FILES

if TYPE_CHECKING:
    from data.tokenizer.sentencepiece import SentencePieceTokenizer


def exported(tokenizer: "SentencePieceTokenizer") -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a lossless tokenizer: the same ids, for U+2581 too.

    SentencePiece merges the neighbours whose union has the best score, the leftmost first; `tokenizers` has a rank for
    each pair. A piece's pairs get neighbouring ranks, in the order of scores. Pieces hold the space itself, where
    SentencePiece puts U+2581 for it: that character is then one without a piece, and spelled in bytes, as it is by us.
    Opened there, control tokens written out in a text are recognised, and what stands around a text here does there
    (`affixes`). A model that is no BPE, or has pieces that are matched before it merges, gives nothing: {}.
    """
    processor, count = tokenizer.processor, len(tokenizer.processor)
    ids, controls = {}, []
    for i in range(count):
        ordinary = not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        piece = processor.id_to_piece(i)
        ids[tokenizer.bytes_of[i].decode() if ordinary else piece] = i
        if not ordinary and not processor.is_byte(i):
            controls.append((i, piece))
    control_ids = {i for i, _ in controls}
    scores = [processor.get_score(i) for i in ids.values() if not (i in control_ids or processor.is_byte(i))]
    if scores != [-rank for rank in range(len(scores))]:  # as SentencePiece's BPE has them, and nothing else
        return {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    around = {id: processor.id_to_piece(id) for id in (*tokenizer.affixes.prefix, *tokenizer.affixes.suffix)}

    def framed(sequence: str, kind: int) -> list[dict]:
        before, after = ([{"SpecialToken": {"id": around[id], "type_id": kind}} for id in side] for side in tokenizer.affixes)
        return [*before, {"Sequence": {"id": sequence, "type_id": kind}}, *after]

    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece} | flags | {"special": True} for i, piece in controls],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": framed("A", 0),
            "pair": framed("A", 0) + framed("B", 1),
            "special_tokens": {piece: {"id": piece, "ids": [id], "tokens": [piece]} for id, piece in around.items()},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(tokenizer.unknown_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges(ids, {i: processor.get_score(i) for i in ids.values()}),
        },
    }
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unknown_id, "mask": tokenizer.mask_id}
    named = {f"{role}_token": processor.id_to_piece(i) for role, i in roles.items() if i is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named | tokenizer.flags
    return {
        JSON: json.dumps(spec, ensure_ascii=False).encode(),
        SIDE_FILES[0]: json.dumps(settings, indent=2).encode(),
    }


def merges(ids: dict[str, int], score: dict[int, float]) -> list[list[str]]:
    """Every pair of pieces whose union is a piece: the best union first, and of its pairs the one that is made first.

    >>> merges({"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}, {0: 0, 1: 0, 2: -1, 3: -2, 4: -3})
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
