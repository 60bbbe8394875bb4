"""One interface to all tokenizers.

    base            the interface `Tokenizer`
    open            load_tokenizer: the class is chosen by the files of a folder
    sentencepiece   SentencePiece models: our own (lossless on any text) and published ones
    tokenizer_json  tokenizer.json and vocab.txt, run by the library `tokenizers`
    pieces          the bytes of its pieces
    chat_templates  the Jinja text of chat templates beside a tokenizer, by name
    export          our SentencePiece models as tokenizer.json, for transformers
    training        trains our SentencePiece BPE on a corpus
    bpe             the same trainer and encoder in plain Python, to read; nothing runs it
"""

from importlib import import_module

MOVED = {"Tokenizer": "base", "load_tokenizer": "open"}  # forwarded for one version


def __getattr__(name: str):
    if name in MOVED:
        return getattr(import_module(f"{__name__}.{MOVED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
