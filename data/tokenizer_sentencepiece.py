"""SentencePiece models: our own, which lose nothing on any text, and foreign ones (Llama's, T5's) by their own rules.

Source: Kudo and Richardson 2018, arXiv 1808.06226. A model of ours (data.tokenizer_training) has byte fallback,
identity normalisation and no dummy prefix. U+2581, which stands for a space inside, would come back as one: its three
byte pieces are written directly.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import sentencepiece

from data.config import DataError
from data.tokenizer import PROBE, SENTENCEPIECE, WELL_KNOWN, Tokenizer, first_id
from data.tokenizer_export import exported

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """One SentencePiece model. Control pieces are never made from text, and decode to nothing.

    Ours: 0 `<unk>`, 1 `<s>`, 2 `</s>`, and 3 `[MASK]` where it was asked for.
    A model that does not give PROBE back is `lossless=False`: it encodes and decodes by the library's own rules.
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
        super().__init__(
            {name: model_bytes},
            # What each id stands for: text is put together from these, so that broken sequences stay visible.
            [self._bytes_of(i) for i in range(count)],
            roles=roles,
            control_ids={*controls.values(), unknown},
            sha256=hashlib.sha256(model_bytes).hexdigest(),
            vocab_size=vocab_size,
        )
        self.model_bytes = model_bytes
        self.control_of = controls
        # A capturing group keeps the control tokens between the parts of the text.
        self.control_text = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
        self.space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = self._encode_lossless(PROBE)
        self.lossless = unknown not in ids and self._decode_bytes(ids) == PROBE
        self._encode = self._encode_lossless if self.lossless else processor.encode
        self._decode = self._decode_bytes if self.lossless else self._decode_by_library
        if not self.lossless:
            self.files |= beside or {}

    def _bytes_of(self, i: int) -> bytes:
        piece = self.processor.id_to_piece(i)
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The ids of `text`, without <s> and </s>. A lone surrogate, which has no UTF-8, raises UnicodeEncodeError.

        specials=True cuts the text at control tokens and encodes the parts alone: a model with a dummy prefix puts
        it before each.
        """
        parts = self.control_text.split(text) if specials else [text]
        try:
            ids = self._encode(parts[0])
            for control, part in zip(parts[1::2], parts[2::2], strict=True):
                ids += [self.control_of[control], *self._encode(part)]
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
