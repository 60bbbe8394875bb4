"""The bytes of a tokenizer.json's pieces, by its decoder."""

from collections.abc import Callable


def flatten_components(component: dict | None) -> list[dict]:
    """Return the parts of a pre-tokenizer or decoder: a Sequence has several, nested."""
    if component is None:
        return []
    inner = component.get("pretokenizers") or component.get("decoders")
    return [part for each in inner for part in flatten_components(each)] if inner else [component]


def byte_alphabet() -> dict[str, int]:
    """Return {character: byte} of byte-level BPE: a printable byte is itself, the others are 256, 257, … in order.

    Source: Radford et al. 2019 (GPT-2), `bytes_to_unicode` in encoder.py.

    >>> byte_alphabet()["\\u0120"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def choose_piece_decoder(spec: dict) -> Callable[[str], bytes]:
    """Return the function from a piece to its bytes, for the decoder in the file. Exact for the first two.

        ByteLevel              each character is a byte
        ByteFallback           <0xE2> is a byte; \u2581 is a space
        Metaspace              \u2581 is a space
        WordPiece              ##ing is "ing", ing is " ing": a space before each word, even if the text has none
        end of word (CLIP's)   ing</w> is "ing "
        none                   the library joins pieces by spaces: " ing"
    """
    decoders = {part["type"]: part for part in flatten_components(spec.get("decoder"))}
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
