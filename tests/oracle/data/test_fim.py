"""Prompts of fill in the middle, id by id: transformers' Code Llama tokenizer, and the published strings by transformers."""

import json
import random

import pytest
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.models.code_llama.tokenization_code_llama import CodeLlamaTokenizer

from data.tokenizer.open import load_tokenizer
from data.transforms.fim import FORMATS, FillInMiddle, find_format
from tests.compare import Error

LIBRARY = f"transformers {transformers.__version__}"
WORDS = "def return value  list of\n\titems café x=1 print(self) <fim_ for in range \U0001f600".split(" ")
# The prompts that the models' cards show, in the orders that they were trained with.
PUBLISHED = {
    "starcoder": {
        "psm": "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>{middle}",
        "spm": "<fim_prefix><fim_suffix>{suffix}<fim_middle>{prefix}¦{middle}",
    },
    "santacoder": {
        "psm": "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>{middle}",
        "spm": "<fim-prefix><fim-suffix>{suffix}<fim-middle>{prefix}¦{middle}",
    },
    "qwen": {"psm": "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}"},
    "deepseek": {"psm": "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>{middle}"},
}


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    names = ("prefix", "middle", "suffix")
    return [{name: " ".join(draw.choices(WORDS, k=draw.randint(0, 6))) for name in names} for _ in range(count)]


def differing(ours: list[list[int]], theirs: list[list[int]]) -> Error:
    return Error(sum(a != b for a, b in zip(ours, theirs, strict=True)), "count")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_prompts(name, tmp_path, parity):
    """Byte-level BPE with the format's tokens; Qwen's and DeepSeek's are not marked as special, as in their folders."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    is_special = name in ("starcoder", "santacoder")
    added = list(FORMATS[name].names.values())
    library.add_special_tokens(added) if is_special else library.add_tokens(added)
    end = "<|endoftext|>"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token=end, eos_token=end)
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert find_format(tokenizer) == name and (added[0] in tokenizer.control_tokens) == is_special
    fim = FillInMiddle(tokenizer, name)
    for order, pattern in PUBLISHED[name].items():
        ours = [fim.assemble(fim.encode_parts(parts, order), order)[0] for parts in texts(200)]
        pieces = pattern.split("¦")  # each tokenized by itself
        expected = [[id for piece in pieces for id in theirs(piece.format(**parts))["input_ids"]] for parts in texts(200)]
        parity(f"fim: {name} {order}", LIBRARY, differing(ours, expected), 0, "the same ids")
    cases = [(order, parts | {"middle": ""}) for order in PUBLISHED[name] for parts in texts(200)]
    prompts = [fim.build_prompt(parts["prefix"], parts["suffix"], order) for order, parts in cases]
    published = [PUBLISHED[name][order].replace("¦", "").format(**parts) for order, parts in cases]
    expected = [theirs(text)["input_ids"] for text in published]
    parity(f"fim: {name} prompt", LIBRARY, differing(prompts, expected), 0, "the same ids")


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory):
    library = Library(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    trained = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=trained))
    merges = [tuple(merge) for merge in json.loads(library.to_str())["model"]["merges"]]
    folder = tmp_path_factory.mktemp("code_llama")
    CodeLlamaTokenizer(vocab=library.get_vocab(), merges=merges).save_pretrained(folder)
    return CodeLlamaTokenizer(vocab=library.get_vocab(), merges=merges, add_prefix_space=False), load_tokenizer(folder)


def test_code_llama(code_llama, parity):
    """Its own class splits at <FILL_ME> and puts a space before the prefix; the suffix has none, as in Meta's own code. (With
    add_prefix_space, the default of transformers 5, its pre-tokenizer puts one before the suffix too.)"""
    theirs, tokenizer = code_llama
    assert find_format(tokenizer) == "codellama"
    fim = FillInMiddle(tokenizer, "codellama")
    # Its class takes an empty suffix for no gap at all, an empty prefix for a space (Meta's code and ours encode nothing), and
    # puts a space before a prefix that begins with one, which its tokenizer.json does not.
    several = [parts for parts in texts(300) if parts["suffix"] and parts["prefix"] and parts["prefix"][0] != " "]
    begin = list(tokenizer.affixes.prefix)
    for order in ("psm", "spm"):
        ours = [begin + fim.build_prompt(parts["prefix"], parts["suffix"], order) for parts in several]
        filled = [f"{parts['prefix']}<FILL_ME>{parts['suffix']}" for parts in several]
        expected = [theirs(text, suffix_first=order == "spm")["input_ids"] for text in filled]
        parity(f"fim: codellama {order}", LIBRARY, differing(ours, expected), 0, "the same ids")
