"""Copies the files beside the weights of a merged folder: the base's, and the tokenizer that the adapter was trained with."""

import filecmp
import shutil
import warnings
from pathlib import Path

from model.folders import copy_auxiliary_files

VOCABULARIES = (  # a tokenizer is one of these, with TOKENIZER_FILES
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
REWARD = "reward.json"  # mean score of a reward model
GENERATION = "generation_config.json"  # instruction tuning writes it into an adapter's folder: the ids that end a reply


def copy_side_files(base: Path, adapter: Path, out: Path) -> None:
    """Copy the base's files, and over them the tokenizer's files and the generation_config.json of the adapter's folder:
    trainers save there the tokenizer of the adapter's ids. If the adapter's folder has a vocabulary, no file of the base's
    tokenizer is copied."""
    own = [name for name in (*VOCABULARIES, *TOKENIZER_FILES, GENERATION) if (adapter / name).is_file()]
    for name in own:
        shutil.copyfile(adapter / name, out / name)
    if (adapter / REWARD).is_file():
        shutil.copyfile(adapter / REWARD, out / REWARD)
    copied = copy_auxiliary_files(base, out)
    if any(name in VOCABULARIES for name in own):
        for name in copied:
            if name in (*VOCABULARIES, *TOKENIZER_FILES):
                (out / name).unlink()
    other = [name for name in own if not (base / name).is_file() or not filecmp.cmp(adapter / name, base / name, shallow=False)]
    if GENERATION in other:
        other.remove(GENERATION)
        warnings.warn(f"{GENERATION} is that of {adapter}, not the base's: it has the ids that end a reply", stacklevel=5)
    if other:
        warnings.warn(f"the tokenizer is that of {adapter}, not the base's: {', '.join(other)}", stacklevel=5)
