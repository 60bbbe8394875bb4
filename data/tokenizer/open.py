"""Open a tokenizer: its files choose the class.

The classes are imported when a file needs them: only tokenizer.json and vocab.txt need the library `tokenizers`.
"""

from importlib import import_module
from pathlib import Path

from data.config import DataError
from data.tokenizer.base import ADDED_TOKENS, SIDE_FILES, TOKENIZER_JSON, TOKENIZER_MODEL, VOCAB_TXT, Tokenizer
from data.tokenizer.chat_templates import read_template_files

BPE_MODEL = "sentencepiece.bpe.model"
READERS = {  # a file, in order of preference -> the module whose `read` opens it
    TOKENIZER_MODEL: "sentencepiece",
    TOKENIZER_JSON: "tokenizer_json",
    "spiece.model": "sentencepiece",
    BPE_MODEL: "sentencepiece",
    VOCAB_TXT: "tokenizer_json",
}
READERS_OF_SUFFIX = {Path(name).suffix: module for name, module in READERS.items()}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of a Git LFS pointer


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer of a folder, or of one of its files.

    vocab_size: of the network's embedding; it may be larger than the tokenizer's.
    A folder's first file in READERS is read, except that a lossy tokenizer.model gives way to a tokenizer.json: published
    networks were trained on the latter's ids. Errors (DataError) name the file: none found, unreadable, a Git LFS pointer.
    """
    path = Path(path)
    if not path.is_dir():
        return read_tokenizer(path, vocab_size)
    found = [path / name for name in READERS if (path / name).is_file()]
    if not found:
        raise DataError(
            f"{path}: no tokenizer can be read there: none of {', '.join(READERS)} exists. "
            "(transformers' AutoTokenizer.from_pretrained(…).save_pretrained writes a tokenizer.json for most models)"
        )
    if found[0].name == BPE_MODEL:
        raise DataError(
            f"{found[0]}: models with this file (XLM-RoBERTa, mBART, …) shift its ids, each in its own way, and only "
            f"a {TOKENIZER_JSON} beside it says how. Save one with transformers; or name the file itself to read its own ids"
        )
    tokenizer = read_tokenizer(found[0], vocab_size)
    if found[0].name == TOKENIZER_MODEL and not tokenizer.is_lossless and path / TOKENIZER_JSON in found:
        return read_tokenizer(path / TOKENIZER_JSON, vocab_size)
    return tokenizer


def read_tokenizer(file: Path, vocab_size: int | None) -> Tokenizer:
    """Return the tokenizer of one file; the suffix chooses the class."""
    try:
        content = file.read_bytes()
        if content.startswith(LFS_POINTER):
            raise DataError("a Git LFS pointer, not the file: fetch it with `git lfs pull`")
        beside = (*SIDE_FILES, ADDED_TOKENS) if file.suffix == ".model" else SIDE_FILES
        side_files = {name: (file.parent / name).read_bytes() for name in beside if (file.parent / name).is_file()}
        if file.suffix not in READERS_OF_SUFFIX:
            raise DataError(f"not a tokenizer's file; readable are {', '.join(READERS)}")
        reader = import_module(f"data.tokenizer.{READERS_OF_SUFFIX[file.suffix]}")
        tokenizer = reader.read(file.name, content, side_files, vocab_size)
        tokenizer.template_files = read_template_files(file.parent)
        return tokenizer
    except OSError as error:
        raise DataError(f"{file}: no tokenizer can be read there ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
