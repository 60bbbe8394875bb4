"""SentencePiece models: our own, which lose nothing on any text, and foreign ones (Llama's, T5's) by their own rules.

Source: Kudo and Richardson 2018, arXiv 1808.06226. A model of ours (data.tokenizer_training) has byte fallback,
identity normalisation and no dummy prefix. U+2581, which stands for a space inside, would come back as one: its three
byte pieces are written directly.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

from data.config import DataError
from data.tokenizer.base import PROBE, SENTENCEPIECE, SIDE_FILES, WELL_KNOWN, Affixes, Tokenizer, first_id
from data.tokenizer.export import exported

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """One SentencePiece model. Control pieces are never made from text, and decode to nothing.

    Ours: 0 `<unk>`, 1 `<s>`, 2 `</s>`, and 3 `[MASK]` where it was asked for.
    A model that does not give PROBE back is `lossless=False`: it encodes and decodes by the library's own rules.

    What stands around a text: by `add_bos_token` and `add_eos_token` of tokenizer_config.json; where that is silent <s> if the
    model has one (LLaMA's documented default), else </s> after it (T5). Ours for masked language models has both.
    """

    def __init__(
        self,
        model_bytes: bytes,
        vocab_size: int | None = None,
        *,
        name: str = SENTENCEPIECE,
        beside: dict[str, bytes] | None = None,
    ):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error})") from error
        processor, count = self.processor, self.processor.vocab_size()
        controls = {processor.id_to_piece(i): i for i in range(count) if processor.is_control(i)}
        unknown = processor.unk_id()
        roles = {role: first_id(controls, names) for role, names in WELL_KNOWN.items()} | {"unk": unknown}
        for role, id in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("pad", processor.pad_id())):
            roles[role] = id if id >= 0 else roles[role]  # -1: the model has none
        said = settings_of(beside or {})
        flags = {key: said[key] for key in ("add_bos_token", "add_eos_token") if key in said}
        flags |= {"bos_token": None} if said.get("bos_token", "") is None else {}
        super().__init__(
            {name: model_bytes},
            # What each id stands for: text is put together from these, so that broken sequences stay visible.
            [self._bytes_of(i) for i in range(count)],
            roles=roles,
            controls=controls,
            control_ids={*controls.values(), unknown},
            affixes=affixes_of(roles, said),
            sha256=hashlib.sha256(model_bytes + (json.dumps(flags).encode() if flags else b"")).hexdigest(),
            vocab_size=vocab_size,
        )
        self.model_bytes, self.flags = model_bytes, flags
        # A capturing group keeps the control tokens between the parts of the text.
        self.control_text = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
        self.space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = self._encode_lossless(PROBE)
        self.lossless = unknown not in ids and self._decode_bytes(ids) == PROBE
        self._encode = self._encode_lossless if self.lossless else processor.encode
        self._decode = self._decode_bytes if self.lossless else self._decode_by_library
        if not self.lossless or flags:
            self.files |= beside or {}

    def _bytes_of(self, i: int) -> bytes:
        piece = self.processor.id_to_piece(i)
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    def _ids(self, text: str, specials: bool) -> list[int]:
        """specials=True cuts the text at control tokens and encodes the parts alone: a model with a dummy prefix puts it before
        each."""
        parts = self.control_text.split(text) if specials else [text]
        try:
            ids = self._encode(parts[0])
            for control, part in zip(parts[1::2], parts[2::2], strict=True):
                ids += [self.controls[control], *self._encode(part)]
        except RuntimeError:
            text.encode()  # says which character and where; the library says "unable to cast"
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    def save(self, folder: str | Path) -> None:
        """The model as it came; a lossless one with a tokenizer.json of the same ids, for transformers."""
        super().save(folder)
        for name, content in self.exported.items():
            Path(folder, name).write_bytes(content)

    @cached_property
    def exported(self) -> dict[str, bytes]:
        return exported(self) if self.lossless else {}

    def _encode_lossless(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_ids
            ids += self.processor.encode(part)
        return ids

    def _decode_bytes(self, ids: Iterable[int]) -> str:
        return b"".join([self.bytes_of[i] for i in ids]).decode(errors="replace")

    def _decode_by_library(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if int(i) not in self.special_ids])


def settings_of(beside: dict[str, bytes]) -> dict:
    """tokenizer_config.json, as far as it is there and can be read."""
    try:
        said = json.loads(beside[SIDE_FILES[0]])
    except (KeyError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def affixes_of(roles: dict[str, int | None], said: dict) -> Affixes:
    """What stands around a text.

    >>> roles = {"bos": 1, "eos": 2, "mask": None}
    >>> affixes_of(roles, {}), affixes_of(roles, {"add_bos_token": False, "add_eos_token": True})
    (Affixes(prefix=(1,), suffix=()), Affixes(prefix=(), suffix=(2,)))
    """
    bos = None if said.get("bos_token", "") is None else roles["bos"]
    eos = None if said.get("eos_token", "") is None else roles["eos"]
    begins = said.get("add_bos_token", bos is not None)
    ends = said.get("add_eos_token", bos is None or roles["mask"] is not None)
    return Affixes((bos,) if begins and bos is not None else (), (eos,) if ends and eos is not None else ())
