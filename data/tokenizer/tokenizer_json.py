"""Any tokenizer that has a tokenizer.json, or BERT's vocab.txt, run by the library `tokenizers`.

Published files do three things that are undone here. A padding and a cut to some length (sentence-transformers save
both) are taken off. Control tokens are not added by the library: what its post-processor would put around a text is read off
the file (`read_affixes`). And text never makes one: the library finds `[MASK]` in text, and a Unigram model holds `</s>` among
its pieces, so the tokenizer that encodes plain text knows them by other names.

Where there is a tokenizer.json, its post-processor alone says what stands around a text: so transformers 5 has it, which passes
over `add_bos_token` and `add_eos_token` then.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from data.config import DataError
from data.tokenizer.base import JSON, PROBE, SIDE_FILES, VOCAB, WELL_KNOWN, Affixes, Tokenizer, first_id

ROLES = {  # the names of transformers, of which BERT's first and last token are the second
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "mask": ("mask_token",),
    "pad": ("pad_token",),
}
UTF8_BYTES = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}  # the others occur in no text
UNDONE = {"post_processor": None, "truncation": None, "padding": None}
HIDDEN = "\uffff"  # before a control token's name; Unicode keeps this character out of all text


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`. Control tokens: those marked special, those with a role, the unknown one.

    Roles come from tokenizer_config.json, then special_tokens_map.json; a role that neither speaks of goes to the
    token of a well-known name; where they say that there is none (null), there is none.
    """

    def __init__(self, files: dict[str, bytes], vocab_size: int | None = None):
        try:
            side = {name: json.loads(files[name]) for name in reversed(SIDE_FILES) if name in files}
            named = {key: value for content in side.values() for key, value in content.items()}
            spec = json.loads(files[JSON]) if JSON in files else bert_spec(files[VOCAB], named)
            processor = spec.get("post_processor")
            model = spec["model"]
            added = [*spec["added_tokens"], *added_by_settings(named, piece_ids(model), spec["added_tokens"])]
            self.spec = spec | UNDONE | {"added_tokens": added}
            ids = piece_ids(model) | {token["content"]: token["id"] for token in added}
            bytes_of_piece = piece_rule(self.spec)
            bytes_of = [b""] * (max(ids.values()) + 1)
            for piece, id in ids.items():
                bytes_of[id] = bytes_of_piece(piece)
            for token in added:  # these are written as they are
                bytes_of[token["id"]] = token["content"].encode()
            roles = {role: role_id(role, named, ids) for role in ROLES} | {"unk": unknown_id(model, ids)}
            affixes = read_affixes(processor) if processor else affixes_of_class(named, model, roles)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"the file, or {' or '.join(SIDE_FILES)} beside it, is damaged ({error!r})") from error
        control_ids = {token["id"] for token in added if token["special"]} | {id for id in roles.values() if id is not None}
        control_ids |= set(range(len(bytes_of))) - set(ids.values())  # gaps in the numbering
        for id in control_ids:
            bytes_of[id] = b""
        # Unknown text makes the unknown token, by its name.
        hidden = {piece for piece, id in ids.items() if id in control_ids and id != roles["unk"]}
        plain = json.dumps(hide(self.spec, hidden), ensure_ascii=False)
        digest = hashlib.sha256((plain + json.dumps(sorted(control_ids)) + json.dumps(roles) + json.dumps(affixes)).encode())
        super().__init__(
            files,
            bytes_of,
            roles=roles,
            controls={piece: id for piece, id in ids.items() if id in control_ids},
            control_ids=control_ids,
            affixes=affixes,
            sha256=digest.hexdigest(),
            vocab_size=vocab_size,
        )
        self.plain = backend(plain)
        self.plain.encode_special_tokens = True
        check_added(added, self.plain, hidden)
        probed = self._ids(PROBE, False)
        spells_all = UTF8_BYTES <= set(bytes_of)
        self.lossless = spells_all and self._decode_bytes(probed) == PROBE and self.unknown_id not in probed
        self._decode = self._decode_bytes if self.lossless else self._decode_by_library

    @cached_property
    def with_specials(self) -> Any:
        """The tokenizer as its file has it, which finds control tokens in text; made when first asked for."""
        return backend(json.dumps(self.spec, ensure_ascii=False))

    def _ids(self, text: str, specials: bool) -> list[int]:
        text.encode()  # a lone surrogate: the library's message would not say which
        return (self.with_specials if specials else self.plain).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def _decode_bytes(self, ids: Iterable[int]) -> str:
        return b"".join([self.bytes_of[i] for i in ids]).decode(errors="replace")

    def _decode_by_library(self, ids: Iterable[int]) -> str:
        return self.plain.decode([int(i) for i in ids if int(i) not in self.special_ids], skip_special_tokens=False)


def backend(spec: str) -> Any:
    """The library's tokenizer; here, so that nothing else needs the library."""
    try:
        import tokenizers
    except ImportError:
        raise DataError("to read it takes the library tokenizers: pip install -c constraints.txt -e '.[hub]'") from None
    try:
        return tokenizers.Tokenizer.from_str(spec)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"the library tokenizers cannot read it ({error})") from error


def read_affixes(processor: dict | None) -> Affixes:
    """What a post-processor puts around one text.

    >>> read_affixes({"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]})
    Affixes(prefix=(101,), suffix=(102,))
    >>> read_affixes({"type": "ByteLevel"})
    Affixes(prefix=(), suffix=())
    """
    kind = processor["type"] if processor else None
    if kind in (None, "ByteLevel"):
        return Affixes()
    if kind in ("BertProcessing", "RobertaProcessing"):
        return Affixes((processor["cls"][1],), (processor["sep"][1],))
    if kind == "Sequence":
        inner = [read_affixes(each) for each in processor["processors"]]
        return Affixes(
            tuple(id for each in reversed(inner) for id in each.prefix), tuple(id for each in inner for id in each.suffix)
        )
    if kind != "TemplateProcessing":
        raise ValueError(f"its post_processor is of type {kind!r}, which is not read")
    sides, side, ids = ([], []), 0, processor["special_tokens"]
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(ids[piece["SpecialToken"]["id"]]["ids"])
    return Affixes(tuple(sides[0]), tuple(sides[1]))


FRAMED = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "RoFormerTokenizer", "RobertaTokenizer", "BartTokenizer")


def affixes_of_class(named: dict, model: dict, roles: dict[str, int | None]) -> Affixes:
    """Where a file has no post-processor: transformers' classes of BERT, RoBERTa and T5 have one of their own."""
    kind = str(named.get("tokenizer_class") or "").removesuffix("Fast")
    if kind in FRAMED or (not kind and model.get("type") == "WordPiece"):
        return Affixes(*((id,) if id is not None else () for id in (roles["bos"], roles["eos"])))
    return Affixes((), (roles["eos"],)) if kind == "T5Tokenizer" and roles["eos"] is not None else Affixes()


def added_by_settings(named: dict, pieces: dict[str, int], added: list[dict]) -> list[dict]:
    """Tokens that tokenizer_config.json or special_tokens_map.json name and tokenizer.json lacks: they get the next ids, as
    transformers has them added."""
    told = [token for _, token in sorted(named.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))]
    told += [value for key, value in named.items() if key.endswith("_token") and isinstance(value, str | dict)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(key) or []
        told += more.values() if isinstance(more, dict) else more
    there = pieces | {token["content"]: token["id"] for token in added}
    new: dict[str, dict] = {}
    for token in told:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        flags |= {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k in (*flags, "content")}
        if flags["content"] and flags["content"] not in there | new:
            new[flags["content"]] = {"id": max(there.values()) + 1 + len(new)} | flags
    return list(new.values())


def check_added(added: list[dict], made: Any, hidden: set[str]) -> None:
    """The library numbers added tokens by itself: in a file whose ids have gaps, they would not be the file's."""
    for token in added:
        name, id = token["content"], made.token_to_id(hidden_name(token["content"], hidden))
        if id != token["id"]:
            raise DataError(f"it says that {name!r} has id {token['id']}, but the library tokenizers gives it {id}")


def hidden_name(piece: str, hidden: set[str]) -> str:
    return HIDDEN + piece if piece in hidden else piece


def piece_ids(model: dict) -> dict[str, int]:
    """Piece -> id; a Unigram model has a list of (piece, score), the others a table."""
    vocabulary = model["vocab"]
    return {piece: id for id, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)


def unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    return model["unk_id"] if "unk_id" in model else ids.get(model.get("unk_token"))


def role_id(role: str, named: dict, ids: dict[str, int]) -> int | None:
    """The id of the token with a role. A name is a string or {"content": …}.

    >>> role_id("mask", {"mask_token": {"content": "<mask>"}}, {"[MASK]": 1, "<mask>": 2})
    2
    >>> role_id("bos", {}, {"<s>": 1}), role_id("bos", {"bos_token": None}, {"<s>": 1})
    (1, None)
    """
    spoken_of = [key for key in ROLES[role] if key in named]
    names = [named[key]["content"] if isinstance(named[key], dict) else named[key] for key in spoken_of]
    if any(name in ids for name in names):
        return first_id(ids, names)
    return None if spoken_of and not any(names) else first_id(ids, WELL_KNOWN[role])


def hide(spec: dict, controls: set[str]) -> dict:
    """`spec` with the control tokens under names that no text holds, at their old ids.

    >>> hide({"model": {"vocab": {"a": 0, "<s>": 1}, "merges": ["< s>"]}, "added_tokens": []}, {"<s>"})["model"]
    {'vocab': {'a': 0, '\\uffff<s>': 1}, 'merges': []}
    """
    model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden_name(piece, controls), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden_name(piece, controls): id for piece, id in model["vocab"].items()}
    if "merges" in model:  # converted from SentencePiece, a file may merge `<` and `s>`; a merge is "a b" or ["a", "b"]
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if controls.isdisjoint([*pair, "".join(pair)])]
    added = [token | {"content": hidden_name(token["content"], controls)} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added}


def components(component: dict | None) -> list[dict]:
    """A pre-tokenizer's or decoder's parts; a Sequence holds others."""
    if component is None:
        return []
    inner = component.get("pretokenizers") or component.get("decoders")
    return [part for each in inner for part in components(each)] if inner else [component]


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: a printable byte is itself, the others are 256, 257, … in their order.

    Source: Radford et al. 2019 (GPT-2), `bytes_to_unicode` in encoder.py.

    >>> byte_alphabet()["\\u0120"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def piece_rule(spec: dict) -> Callable[[str], bytes]:
    """What a piece stands for, by the decoder that the file names. Exact for the first two.

        ByteLevel              each character is a byte
        ByteFallback           <0xE2> is a byte; \u2581 is a space
        Metaspace              \u2581 is a space
        WordPiece              ##ing is "ing", ing is " ing": a space before each word, which the text may not have had
        end of word (CLIP's)   ing</w> is "ing "
        none                   the library joins pieces by spaces: " ing"
    """
    decoders = {part["type"]: part for part in components(spec.get("decoder"))}
    model = spec["model"]
    if "ByteLevel" in decoders:
        alphabet = byte_alphabet()
        return lambda piece: bytes([alphabet[c] for c in piece]) if set(piece) <= alphabet.keys() else piece.encode()
    if "WordPiece" in decoders or model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or "##"
        return lambda piece: piece[len(prefix) :].encode() if piece.startswith(prefix) else b" " + piece.encode()
    if "BPEDecoder" in decoders:
        suffix = decoders["BPEDecoder"]["suffix"]
        return lambda piece: piece.removesuffix(suffix).encode() + b" " * piece.endswith(suffix)
    if decoders:
        space = decoders.get("Metaspace", {}).get("replacement", "\u2581")
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if model.get("byte_fallback") else {}
        return lambda piece: fallback.get(piece) or piece.replace(space, " ").encode()
    return lambda piece: b" " + piece.encode()


def bert_spec(vocabulary: bytes, settings: dict) -> dict:
    """The tokenizer.json of a vocab.txt, a piece a line, as transformers' BertTokenizer reads it with these settings.

    Source: Devlin et al. 2019, arXiv 1810.04805, and its tokenization.py.
    """
    lines = vocabulary.decode().removesuffix("\n").split("\n")  # not splitlines: some vocabularies hold U+2028
    ids = {line.removesuffix("\r"): id for id, line in enumerate(lines)}
    controls = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece in ids]
    if "[UNK]" not in controls:
        raise ValueError("no line of it is [UNK]")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    def around(ids: dict[str, int]) -> dict | None:
        parts = {part: [piece, ids.get(piece)] for part, piece in (("sep", "[SEP]"), ("cls", "[CLS]"))}
        return None if None in (parts["sep"][1], parts["cls"][1]) else {"type": "BertProcessing"} | parts

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[piece], "content": piece, "special": True} | flags for piece in controls],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": around(ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
