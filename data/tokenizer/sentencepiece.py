"""SentencePiece models: our own, lossless on any text, and published ones (LLaMA's, T5's) by their own rules.

Our models (data.tokenizer.training) have byte fallback, identity normalization and no dummy prefix. SentencePiece writes a
space as U+2581 and decodes U+2581 to a space; to stay lossless, U+2581 in a text is encoded as its three byte pieces.
Source: Kudo and Richardson 2018, arXiv 1808.06226.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import DataError
from data.tokenizer.base import (
    ADDED_TOKENS,
    PROBE,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    WELL_KNOWN_NAMES,
    Affixes,
    Tokenizer,
    first_id,
)
from data.tokenizer.export import to_tokenizer_json

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """One SentencePiece model. Text never encodes to a control piece; control pieces decode to nothing.

    Our models: 0 `<unk>`, 1 `<s>`, 2 `</s>`, and optionally 3 `[MASK]`.
    A model that does not reproduce PROBE has `is_lossless=False`: the library encodes and decodes.

    Affixes: add_bos_token and add_eos_token of tokenizer_config.json. Without these, <s> before the text if the model has one
    (LLaMA's documented default), else </s> after it (T5). Our models for masked language modelling have both.
    """

    def __init__(
        self,
        model_bytes: bytes,
        vocab_size: int | None = None,
        *,
        name: str = TOKENIZER_MODEL,
        side_files: dict[str, bytes] | None = None,
    ):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error})") from error
        processor, count = self.processor, self.processor.vocab_size()
        added = read_added_tokens(side_files or {}, [processor.id_to_piece(i) for i in range(count)])
        control_tokens = {processor.id_to_piece(i): i for i in range(count) if processor.is_control(i)} | added
        unknown = processor.unk_id()
        roles = {role: first_id(control_tokens, names) for role, names in WELL_KNOWN_NAMES.items()} | {"unk": unknown}
        for role, id in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("pad", processor.pad_id())):
            roles[role] = id if id >= 0 else roles[role]  # -1: the model has none
        settings = read_settings(side_files or {})
        flags = {key: settings[key] for key in ("add_bos_token", "add_eos_token") if key in settings}
        flags |= {"bos_token": None} if settings.get("bos_token", "") is None else {}
        super().__init__(
            {name: model_bytes},
            [*map(self._bytes_of, range(count)), *[b""] * len(added)],  # decoding joins these: broken UTF-8 stays visible
            roles=roles,
            control_tokens=control_tokens,
            control_ids={*control_tokens.values(), unknown},
            affixes=choose_affixes(roles, settings),
            sha256=hashlib.sha256(model_bytes + b"".join(json.dumps(d).encode() for d in (flags, added) if d)).hexdigest(),
            vocab_size=vocab_size,
        )
        self.model_bytes, self.flags, self.added_tokens = model_bytes, flags, added
        # re.split keeps the control tokens because of the capturing group.
        self.control_text = re.compile("(" + "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) + ")")
        self.adds_space = processor.encode("x", out_type=str)[0].startswith(SPACE)
        self.space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = self._encode_lossless(PROBE)
        self.is_lossless = unknown not in ids and self._decode_bytes(ids) == PROBE
        self._encode = self._encode_lossless if self.is_lossless else processor.encode
        self._decode = self._decode_bytes if self.is_lossless else self._decode_by_library
        if not self.is_lossless or flags:
            self.files |= side_files or {}
        elif added:
            self.files[ADDED_TOKENS] = side_files[ADDED_TOKENS]

    def with_added_tokens(self, names: Sequence[str]) -> "SentencePieceTokenizer":
        """Return the same model with further control tokens, with the ids after its own, written to added_tokens.json.

        Errors (DataError): it has one already.
        """
        if known := [name for name in names if name in self.control_tokens]:
            raise DataError(f"the tokenizer has the control tokens {', '.join(known)} already")
        added = self.added_tokens | {name: self.own_size + number for number, name in enumerate(names)}
        beside = self.files | {ADDED_TOKENS: json.dumps(added, indent=2, ensure_ascii=False).encode()}
        name = next(name for name, content in self.files.items() if content == self.model_bytes)
        size = max(self.vocab_size, self.own_size + len(names))
        other = SentencePieceTokenizer(self.model_bytes, size, name=name, side_files=beside)
        other.template_files = self.template_files
        return other

    def with_affix_flags(self, flags: Mapping[str, bool]) -> "SentencePieceTokenizer":
        """Return the same model with add_bos_token and add_eos_token of a tokenizer_config.json."""
        beside = {TOKENIZER_CONFIG: json.dumps(dict(flags)).encode()}
        return SentencePieceTokenizer(self.model_bytes, self.vocab_size, side_files=beside)

    def _bytes_of(self, i: int) -> bytes:
        piece = self.processor.id_to_piece(i)
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    def _encode_text(self, text: str, parse_special: bool) -> list[int]:
        """Encode; parse_special=True splits at control tokens and encodes each part by itself, dummy prefix included."""
        parts = self.control_text.split(text) if parse_special else [text]
        try:
            ids = self._encode(parts[0])
            for control, part in zip(parts[1::2], parts[2::2], strict=True):
                ids += [self.control_tokens[control], *self._encode(part)]
        except RuntimeError:
            text.encode()  # raises with the character and its index; the library says "unable to cast"
            raise
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return ids and offsets; those of a lossy model are the library's, part by part between control tokens."""
        if self.is_lossless:
            return super().encode_with_offsets(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(self.control_text.split(text)):
            if number % 2:
                ids.append(self.control_tokens[part])
                offsets.append((at, at + len(part)))
            else:
                found = self.processor.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                offsets += [(at + begin, at + end) for begin, end in found["offsets"]]
            at += len(part)
        return self.check_ids(ids), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _encode_part(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return ids and offsets of plain text beside control tokens.

        A model that puts a space before each text takes a text's own first space for it: published templates write that space
        ("[INST] Hi") where the publishers' encoders leave it to the model.
        """
        if self.is_lossless:
            return super()._encode_part(text)
        taken = len(text) - len(text.removeprefix(" ")) if self.adds_space else 0
        found = self.processor.encode(text[taken:], return_type="offset_mapping")
        offset_N2 = np.array(found["offsets"], dtype=np.int64).reshape(-1, 2) + taken
        offset_N2[:1, 0] = 0
        return found["ids"], offset_N2

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write the model as it was read; for a lossless one also a tokenizer.json with the same ids, for transformers."""
        super().save(folder)
        for name, content in self.json_files.items():
            Path(folder, name).write_bytes(content)

    @cached_property
    def json_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json; {} where the model cannot be exported."""
        if not self.is_lossless:
            return {}
        roles = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unknown_id, "mask": self.mask_id}
        described = {"token_bytes": self.token_bytes, "affixes": self.affixes, "roles": roles, "flags": self.flags}
        return to_tokenizer_json(self.processor, added=self.added_tokens, **described)

    def _encode_lossless(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_ids
            ids += self.processor.encode(part)
        return ids

    def _decode_bytes(self, ids: Iterable[int]) -> str:
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def _decode_by_library(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if int(i) not in self.special_ids])


def read(name: str, content: bytes, side_files: dict[str, bytes], vocab_size: int | None) -> Tokenizer:
    """Return the tokenizer of a model file (for `data.tokenizer.open`)."""
    return SentencePieceTokenizer(content, vocab_size, name=name, side_files=side_files)


def read_settings(side_files: dict[str, bytes]) -> dict:
    """Return tokenizer_config.json, {} where it is missing or unreadable."""
    try:
        settings = json.loads(side_files[TOKENIZER_CONFIG])
    except (KeyError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_added_tokens(side_files: dict[str, bytes], pieces: Sequence[str]) -> dict[str, int]:
    """Return the control tokens of added_tokens.json that the model's pieces lack; they have the next ids. Errors: DataError.

    >>> read_added_tokens({"added_tokens.json": b'{"<|im_end|>": 3, "<|im_start|>": 2, "<s>": 1}'}, ["<unk>", "<s>"])
    {'<|im_start|>': 2, '<|im_end|>': 3}
    """
    if ADDED_TOKENS not in side_files:
        return {}
    try:
        added = dict(sorted(json.loads(side_files[ADDED_TOKENS]).items(), key=lambda item: item[1]))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{ADDED_TOKENS} beside it is damaged ({error!r})") from error
    count = len(pieces)
    new = {name: id for name, id in added.items() if not (0 <= id < count and pieces[id] == name)}
    if list(new.values()) != list(range(count, count + len(new))):
        raise DataError(f"{ADDED_TOKENS} beside it has the ids {list(new.values())}, and the model's last one is {count - 1}")
    return new


def choose_affixes(roles: dict[str, int | None], settings: dict) -> Affixes:
    """Return the special tokens around a text.

    >>> roles = {"bos": 1, "eos": 2, "mask": None}
    >>> choose_affixes(roles, {}), choose_affixes(roles, {"add_bos_token": False, "add_eos_token": True})
    (Affixes(prefix=(1,), suffix=()), Affixes(prefix=(), suffix=(2,)))
    """
    bos = None if settings.get("bos_token", "") is None else roles["bos"]
    eos = None if settings.get("eos_token", "") is None else roles["eos"]
    has_bos = settings.get("add_bos_token", bos is not None)
    has_eos = settings.get("add_eos_token", bos is None or roles["mask"] is not None)
    return Affixes((bos,) if has_bos and bos is not None else (), (eos,) if has_eos and eos is not None else ())
