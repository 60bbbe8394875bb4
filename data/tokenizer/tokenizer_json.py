"""Any tokenizer that has a tokenizer.json, or BERT's vocab.txt, run by the library `tokenizers`.

Three things in published files are removed here. Padding and truncation (sentence-transformers save both). The post-processor:
`read_affixes` reads the special tokens that it adds. And special tokens in plain text: the library recognizes `[MASK]` in a
text, and a Unigram model has `</s>` among its pieces, so the tokenizer for plain text has them under other names.

With a tokenizer.json, its post-processor alone decides the affixes, as in transformers 5, which then ignores `add_bos_token`
and `add_eos_token`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from typing import Any

import numpy as np

from data.config import DataError
from data.tokenizer.base import PROBE, SIDE_FILES, TOKENIZER_JSON, VOCAB_TXT, WELL_KNOWN_NAMES, Affixes, Tokenizer, first_id
from data.tokenizer.pieces import choose_piece_decoder

ROLES = {  # keys of tokenizer_config.json; BERT uses the second for its first and last token
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "mask": ("mask_token",),
    "pad": ("pad_token",),
}
UTF8_BYTES = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}  # the other bytes never occur in UTF-8
REMOVED = {"post_processor": None, "truncation": None, "padding": None}
HIDDEN = "\uffff"  # prefix of a hidden token's name: a Unicode noncharacter, which no text should hold
MARKS = (HIDDEN, "\ufffe", *(chr(plane << 16 | 0xFFFE) for plane in range(1, 17)))  # in its place, for texts that do hold it


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`. Control tokens: those marked special, those with a role, the unknown token.

    Roles come from tokenizer_config.json, then special_tokens_map.json. A role in neither goes to the token of a well-known
    name; null in them means no such token.
    """

    def __init__(self, files: dict[str, bytes], vocab_size: int | None = None):
        try:
            settings: dict = {}
            for name in reversed(SIDE_FILES):
                settings |= json.loads(files.get(name, b"{}"))
            spec = json.loads(files[TOKENIZER_JSON]) if TOKENIZER_JSON in files else build_bert_spec(files[VOCAB_TXT], settings)
            processor = spec.get("post_processor")
            model = spec["model"]
            added = [*spec["added_tokens"], *missing_tokens(settings, piece_ids(model), spec["added_tokens"])]
            self.spec = spec | REMOVED | {"added_tokens": added}
            self.post_processor = processor
            ids = piece_ids(model) | {token["content"]: token["id"] for token in added}
            decode_piece = choose_piece_decoder(self.spec)
            token_bytes = [b""] * (max(ids.values()) + 1)
            for piece, id in ids.items():
                token_bytes[id] = decode_piece(piece)
            for token in added:  # added tokens are plain text
                token_bytes[token["id"]] = token["content"].encode()
            roles = {role: role_id(role, settings, ids) for role in ROLES} | {"unk": unknown_id(model, ids)}
            affixes = read_affixes(processor) if processor else default_affixes(settings, model, roles)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"the file, or {' or '.join(SIDE_FILES)} beside it, is damaged ({error!r})") from error
        control_ids = {token["id"] for token in added if token["special"]} | {id for id in roles.values() if id is not None}
        control_ids |= set(range(len(token_bytes))) - set(ids.values())  # gaps in the numbering
        for id in control_ids:
            token_bytes[id] = b""
        # The unknown token keeps its name: the model looks it up for unknown text.
        hidden = {piece for piece, id in ids.items() if id in control_ids and id != roles["unk"]}
        plain = json.dumps(hide(self.spec, hidden), ensure_ascii=False)
        digest = hashlib.sha256((plain + json.dumps(sorted(control_ids)) + json.dumps(roles) + json.dumps(affixes)).encode())
        super().__init__(
            files,
            token_bytes,
            roles=roles,
            control_tokens={piece: id for piece, id in ids.items() if id in control_ids},
            control_ids=control_ids,
            affixes=affixes,
            sha256=digest.hexdigest(),
            vocab_size=vocab_size,
        )
        self.added_tokens = {token["content"]: token["id"] for token in added}
        self.hidden = frozenset(hidden)
        self.hidden_backends: dict[str, Any] = {}
        self.plain = build_backend(plain)
        self.plain.encode_special_tokens = True
        check_added_ids(added, self.plain, hidden)
        probed = self._encode_text(PROBE, False)
        spells_all = UTF8_BYTES <= set(token_bytes)
        self.is_lossless = spells_all and self._decode_bytes(probed) == PROBE and self.unknown_id not in probed
        self._decode = self._decode_bytes if self.is_lossless else self._decode_by_library

    def with_added_tokens(self, names: Sequence[str]) -> "JsonTokenizer":
        """Return a copy with further control tokens, with the next ids, written to its tokenizer.json. Errors: DataError for a
        vocab.txt."""
        if TOKENIZER_JSON not in self.files:
            raise DataError(f"a {VOCAB_TXT} takes no further control tokens ({', '.join(names)}): a {TOKENIZER_JSON} does")
        spec, first = json.loads(self.files[TOKENIZER_JSON]), self.own_size
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        spec["added_tokens"] += [{"id": first + number, "content": name} | flags for number, name in enumerate(names)]
        files = self.files | {TOKENIZER_JSON: json.dumps(spec, ensure_ascii=False).encode()}
        other = JsonTokenizer(files, max(self.vocab_size, first + len(names)))
        other.template_files = self.template_files
        return other

    @cached_property
    def with_specials(self) -> Any:
        """The tokenizer with its own token names, which recognizes special tokens in text; built on first use."""
        return build_backend(json.dumps(self.spec, ensure_ascii=False))

    @cached_property
    def with_offsets(self) -> Any:
        """The tokenizer with its post-processor, which may trim white space from offsets."""
        return build_backend(json.dumps(self.spec | {"post_processor": self.post_processor}, ensure_ascii=False))

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return ids and offsets of the library."""
        text.encode()
        found = self.with_offsets.encode(text, add_special_tokens=False)
        return self.check_ids(found.ids), np.array(found.offsets, dtype=np.int64).reshape(-1, 2)

    def hidden_backend(self, mark: str) -> Any:
        """Return the tokenizer that recognizes control tokens by their hidden names alone; each `mark` is built once.

        They are recognized in the text as it is: tokens that are `normalized` behind a normalizer that puts a space before each
        text, as some of LLaMA's files have them, would not be (nor are they by transformers).
        """
        if mark not in self.hidden_backends:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            added = {token["id"]: token for token in self.spec["added_tokens"] if token["id"] != self.unknown_id}
            for name in self.hidden:  # a role may be that of a piece which the file does not add
                id = self.control_tokens[name]
                added[id] = flags | added.get(id, {"id": id, "content": name}) | {"special": True, "normalized": False}
            if self.unknown_id not in piece_ids(self.spec["model"]).values():  # without it, others would get other ids
                added |= {token["id"]: token for token in self.spec["added_tokens"] if token["id"] == self.unknown_id}
            spec = self.spec | {"added_tokens": [added[id] for id in sorted(added)]}
            self.hidden_backends[mark] = build_backend(json.dumps(hide(spec, self.hidden, mark), ensure_ascii=False))
        return self.hidden_backends[mark]

    def encode_parts(self, parts: Sequence[str | int]) -> tuple[list[int], np.ndarray]:
        """Return ids and offsets of the library, which sees the whole text: flags such as rstrip take white space in."""
        texts = [part for part in parts if isinstance(part, str)]
        mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise DataError(f"it holds all of the {len(MARKS)} Unicode noncharacters at the ends of planes: no text does")
        pieces, place, at = [], [], 0  # place: for each character of the hidden text, its offset in the text of names
        for part in parts:
            name = self.token_name(part) if isinstance(part, int) else part
            name.encode()
            if isinstance(part, int):
                pieces.append(hidden_name(name, self.hidden, mark))
                place.append(np.arange(at + len(name) - len(pieces[-1]), at + len(name)).clip(at))
            else:
                pieces.append(name)
                place.append(np.arange(at, at + len(name)))
            at += len(name)
        found = self.hidden_backend(mark).encode("".join(pieces), add_special_tokens=False)
        place_N = np.concatenate([*place, [at]])
        return self.check_ids(found.ids), place_N[np.array(found.offsets, dtype=np.int64).reshape(-1, 2)]

    def _encode_text(self, text: str, parse_special: bool) -> list[int]:
        text.encode()  # raises for a lone surrogate with its index; the library's message has none
        return (self.with_specials if parse_special else self.plain).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def _decode_bytes(self, ids: Iterable[int]) -> str:
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def _decode_by_library(self, ids: Iterable[int]) -> str:
        return self.plain.decode([int(i) for i in ids if int(i) not in self.special_ids], skip_special_tokens=False)


def build_backend(spec: str) -> Any:
    """Return the library's tokenizer. The import is here: nothing else needs the library."""
    try:
        import tokenizers
    except ImportError:
        raise DataError("reading it needs the library tokenizers: pip install -c constraints.txt -e '.[hub]'") from None
    try:
        return tokenizers.Tokenizer.from_str(spec)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"the library tokenizers cannot read it ({error})") from error


def read_affixes(processor: dict | None) -> Affixes:
    """Return the special tokens that a post-processor adds around one text.

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
        raise ValueError(f"its post_processor is of type {kind!r}, which is not supported")
    sides, side, ids = ([], []), 0, processor["special_tokens"]
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(ids[piece["SpecialToken"]["id"]]["ids"])
    return Affixes(tuple(sides[0]), tuple(sides[1]))


BERT_LIKE = tuple(f"{name}Tokenizer" for name in ("Bert", "DistilBert", "Electra", "RoFormer", "Roberta", "Bart"))


def default_affixes(settings: dict, model: dict, roles: dict[str, int | None]) -> Affixes:
    """Return the affixes of a file without post-processor: transformers' BERT, RoBERTa and T5 classes add their own."""
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if kind in BERT_LIKE or (not kind and model.get("type") == "WordPiece"):
        return Affixes(*((id,) if id is not None else () for id in (roles["bos"], roles["eos"])))
    return Affixes((), (roles["eos"],)) if kind == "T5Tokenizer" and roles["eos"] is not None else Affixes()


def missing_tokens(settings: dict, pieces: dict[str, int], added: list[dict]) -> list[dict]:
    """Return the tokens that SIDE_FILES name and tokenizer.json lacks. They get the next ids, as transformers adds them."""
    tokens = [token for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))]
    tokens += [value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    known = pieces | {token["content"]: token["id"] for token in added}
    new: dict[str, dict] = {}
    for token in tokens:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        flags |= {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k in (*flags, "content")}
        if flags["content"] and flags["content"] not in known | new:
            new[flags["content"]] = {"id": max(known.values()) + 1 + len(new)} | flags
    return list(new.values())


def check_added_ids(added: list[dict], backend: Any, hidden: set[str]) -> None:
    """Raise DataError where the library's ids of added tokens differ from the file's, as they do if the ids have gaps."""
    for token in added:
        name, id = token["content"], backend.token_to_id(hidden_name(token["content"], hidden))
        if id != token["id"]:
            raise DataError(f"it says that {name!r} has id {token['id']}, but the library tokenizers gives it {id}")


def hidden_name(piece: str, hidden: Set[str], mark: str = HIDDEN) -> str:
    return mark + piece if piece in hidden else piece


def piece_ids(model: dict) -> dict[str, int]:
    """Return {piece: id}. A Unigram model has a list of (piece, score), the others a table."""
    vocabulary = model["vocab"]
    return {piece: id for id, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else dict(vocabulary)


def read(name: str, content: bytes, side_files: dict[str, bytes], vocab_size: int | None) -> Tokenizer:
    """Return the tokenizer of a .json or .txt file (for `data.tokenizer.open`)."""
    kind = TOKENIZER_JSON if name.endswith(".json") else VOCAB_TXT
    return JsonTokenizer({kind: content} | side_files, vocab_size)


def unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    return model["unk_id"] if "unk_id" in model else ids.get(model.get("unk_token"))


def role_id(role: str, settings: dict, ids: dict[str, int]) -> int | None:
    """Return the id of the token with a role. In the settings a token is a string or {"content": …}.

    >>> role_id("mask", {"mask_token": {"content": "<mask>"}}, {"[MASK]": 1, "<mask>": 2})
    2
    >>> role_id("bos", {}, {"<s>": 1}), role_id("bos", {"bos_token": None}, {"<s>": 1})
    (1, None)
    """
    values = [settings[key] for key in ROLES[role] if key in settings]
    names = [value["content"] if isinstance(value, dict) else value for value in values]
    if any(name in ids for name in names):
        return first_id(ids, names)
    return None if values and not any(names) else first_id(ids, WELL_KNOWN_NAMES[role])


def hide(spec: dict, controls: Set[str], mark: str = HIDDEN) -> dict:
    """Return `spec` with the control tokens renamed to names that occur in no text; ids stay.

    >>> hide({"model": {"vocab": {"a": 0, "<s>": 1}, "merges": ["< s>"]}, "added_tokens": []}, {"<s>"})["model"]
    {'vocab': {'a': 0, '\\uffff<s>': 1}, 'merges': []}
    """
    model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden_name(piece, controls, mark), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden_name(piece, controls, mark): id for piece, id in model["vocab"].items()}
    if "merges" in model:  # converted from SentencePiece, a file may merge `<` and `s>`; a merge is "a b" or ["a", "b"]
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if controls.isdisjoint([*pair, "".join(pair)])]
    added = [token | {"content": hidden_name(token["content"], controls, mark)} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added}


def build_bert_spec(vocabulary: bytes, settings: dict) -> dict:
    """Return the tokenizer.json of a vocab.txt (one piece a line), as transformers' BertTokenizer reads it with `settings`.

    Source: Devlin et al. 2019, arXiv 1810.04805, and its tokenization.py.
    """
    lines = vocabulary.decode().removesuffix("\n").split("\n")  # not splitlines: some vocabularies hold U+2028
    ids = {line.removesuffix("\r"): id for id, line in enumerate(lines)}
    controls = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece in ids]
    if "[UNK]" not in controls:
        raise ValueError("no line of it is [UNK]")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    has_both = "[SEP]" in ids and "[CLS]" in ids
    processor = {"type": "BertProcessing"} | {"sep": ["[SEP]", ids.get("[SEP]")], "cls": ["[CLS]", ids.get("[CLS]")]}

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
        "post_processor": processor if has_both else None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
