"""What stands beside the weights of a merged folder: the base's files, and the tokenizer that the adapter was trained with."""

import filecmp
import shutil
import warnings
from pathlib import Path

from model.folders import copy_auxiliary_files

VOCABULARIES = (  # a tokenizer is one of these, and what the others say beside it
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


def copy_side_files(base: Path, adapter: Path, out: Path) -> None:
    """The base's files; of the tokenizer's those of the adapter's folder, where it has some: trainers save there the tokenizer
    whose ids the adapter knows. With a vocabulary of its own none of the base's tokenizer stays."""
    own = [name for name in (*VOCABULARIES, *BESIDE) if (adapter / name).is_file()]
    for name in own:
        shutil.copyfile(adapter / name, out / name)
    copied = copy_auxiliary_files(base, out)
    if any(name in VOCABULARIES for name in own):
        for name in copied:
            if name in (*VOCABULARIES, *BESIDE):
                (out / name).unlink()
    other = [name for name in own if not (base / name).is_file() or not filecmp.cmp(adapter / name, base / name, shallow=False)]
    if other:
        warnings.warn(f"the tokenizer is that of {adapter}, not the base's: {', '.join(other)}", stacklevel=5)
