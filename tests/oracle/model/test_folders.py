"""Folders as people download them, beside transformers: special tokens, generation_config.json, ambiguous weights, contexts."""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors

import eval.__main__
import model.hub
from data.config import DataConfig, DataError
from data.corpus.prepare import prepare
from data.tokenizer.open import load_tokenizer
from model.beam import beam_search
from model.config import ConfigError
from model.config import load_family as rules_of
from model.folders import auxiliary_files, copy_auxiliary_files
from model.generate import generate
from model.generation_config import LIMITS, parse_generation_config, read_generation_config
from model.hub import HubError
from model.resize import resize_vocabulary
from tests.compare import mixed, relative
from tests.conftest import TINY_FAMILIES, randomized, tiny_config
from tests.folders import bart, byte_level, change_json, llama, write_tokenizer
from tests.runs import command

LIBRARY = f"transformers {transformers.__version__}"
SPECIALS = ["<s>", "</s>", "<|x|>"]


def template(single: str, *pairs: tuple[str, int]):
    return processors.TemplateProcessing(single=single, special_tokens=list(pairs))


BOS, EOS = ("<s>", 330), ("</s>", 331)
PROCESSORS = {
    "none": None,
    "bytes": processors.ByteLevel(trim_offsets=False),
    "bos": template("<s> $A", BOS),
    "eos": template("$A </s>", EOS),
    "both": template("<s> $A </s>", BOS, EOS),
    "two": template("<|x|> <s> $A", BOS, ("<|x|>", 332)),
    "sequence": processors.Sequence([processors.ByteLevel(), template("<s> $A", BOS)]),
    "roberta": processors.RobertaProcessing(EOS, BOS),
    "bert": processors.BertProcessing(EOS, BOS),
}
FLAGS = {
    "unsaid": {},
    "add_bos": {"add_bos_token": True},
    "no_bos": {"add_bos_token": False},
    "add_eos": {"add_eos_token": True},
    "null": {"bos_token": None},
}


@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("around", PROCESSORS)
def test_what_stands_around_a_text(around, kind, tmp_path):
    """Of a text the ids are those of transformers' tokenizer; a document to train on begins and ends with them."""
    made = byte_level(SPECIALS, PROCESSORS[around])
    for flags in FLAGS.values():
        settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": kind} | flags
        write_tokenizer(tmp_path, made, SPECIALS, **{k: v for k, v in settings.items() if k != "tokenizer_class" or v})
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
        for text in ("The fox", "a</s>b <|x|>", ""):
            ids = theirs(text).input_ids
            assert ours.with_special_tokens(ours.encode(text, parse_special=True)) == ids, (flags, text)
        document, ids = ours.as_document(ours.encode("The fox")), theirs("The fox").input_ids
        stream = document if ours.bos_id != ours.eos_id else [*document[1:], ours.eos_id]  # as a separator ends it
        assert stream in (ids, [*ids, ours.eos_id])
        assert (document[0], document[-1]) == (ours.bos_id, document[-1] if ours.bos_id == ours.eos_id else ours.eos_id)


def test_tokens_that_the_settings_alone_name(tmp_path):
    """A pad that tokenizer.json lacks (Llama 2's fine-tunes): transformers gives it the next id, and so do we."""
    write_tokenizer(tmp_path, byte_level(SPECIALS), SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    change_json(tmp_path / "tokenizer_config.json", extra_special_tokens=["<more>"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.vocab_size) == (theirs.pad_token_id, len(theirs)) == (333, 335)
    text = "a <pad> b <more>"
    assert ours.encode(text, parse_special=True) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("around, separator", [("none", None), ("none", "<|x|>"), ("bos", None), ("both", None)])
def test_documents_to_train_on(around, separator, tmp_path):
    """The ids between two separators are those of transformers' tokenizer."""
    write_tokenizer(tmp_path, byte_level(SPECIALS, PROCESSORS[around]), SPECIALS, bos_token="<s>", eos_token="</s>")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [f"document number {n} about {n * n} foxes" for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig((str(tmp_path / "corpus.jsonl"),), dedup=False, separator=separator, cache=tmp_path / "cache")
    for _ in range(2):  # built, and found
        shards = prepare(config, tokenizer=load_tokenizer(tmp_path))
    ids = [*shards.train.ids.tolist(), *shards.validation.ids.tolist()]
    first = 330 if around != "none" else 332 if separator else 331
    assert ids[0] == shards.tokenizer.bos_id == first
    documents, one = [], []
    for id in [*ids[1:], first]:
        if id == first:
            documents.append(one if around == "none" else [first, *one])
            one = []
        else:
            one.append(id)
    end = [] if around in ("none", "both") else [331]
    assert sorted(document for document in documents if document) == sorted(theirs(text).input_ids + end for text in texts)
    with pytest.raises(DataError, match=r"--separator nonsense: not a control token; there are <s>, </s>, <\|x\|>"):
        prepare(DataConfig(config.corpus, separator="nonsense"), tokenizer=load_tokenizer(tmp_path))
    if around != "none":
        with pytest.raises(DataError, match="this tokenizer begins each text with <s>, which separates documents"):
            prepare(DataConfig(config.corpus, separator="<|x|>"), tokenizer=load_tokenizer(tmp_path))


@pytest.mark.parametrize("around", ["none", "bos", "eos", "both", "two"])
def test_perplexity_of_a_text(around, tmp_path):
    """The command scores the ids of transformers' tokenizer, the first one not: -log p by transformers' own loss."""
    llama(tmp_path, vocab_size=333)
    write_tokenizer(tmp_path, byte_level(SPECIALS, PROCESSORS[around]), SPECIALS, bos_token="<s>", eos_token="</s>")
    text = "The quick fox\nand 27 more"
    (tmp_path / "text.txt").write_text(text)
    said = command("perplexity", tmp_path, tmp_path / "text.txt", "--json", main=eval.__main__.main)
    if around == "two":
        assert said.code == 2 and "--bos auto: this tokenizer adds <|x|> <s>, " in said.err
        return
    assert said.code == 0, said.err
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt").input_ids
    loss = network(ids, labels=ids).loss.item()
    assert json.loads(said.out)["scores"][0]["parts"]["loss"] == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_transformers_finds_every_weight_that_we_write(family, tied, tmp_path):
    """None is missing, and so drawn at random: BART without a tie has its embedding three times."""
    for head, spec in rules_of(tiny_config(family).family).HEADS.items():
        kind, folder = getattr(transformers, spec.architecture or "", None), tmp_path / head
        if kind is None:
            continue
        network = randomized(tiny_config(family, tie_embeddings=tied, head=head), dtype=torch.float32)
        try:
            model.hub.save(network, folder)
        except ValueError as error:
            assert not tied and "has one table for embedding and head" in str(error)
            continue
        _, info = kind.from_pretrained(folder, output_loading_info=True)
        missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}  # the head "none" is no pooler
        assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], (head, info)


GENERATION = {  # what a generation_config.json says
    "several ends": {"eos_token_id": [331, 3, 5, 7, 11]},
    "forced first": {"forced_bos_token_id": 9},
    "forced last": {"forced_eos_token_id": 331},
    "lengths": {"min_length": 9, "eos_token_id": [331, *range(0, 300, 2)]},
    "new lengths": {"min_new_tokens": 5, "eos_token_id": [331, *range(0, 300, 2)]},
    "no repeats": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(0, 200)), "begin_suppress_tokens": list(range(200, 330))},
    "penalized": {"repetition_penalty": 1.7},
    "all": {"min_length": 7, "no_repeat_ngram_size": 3, "forced_eos_token_id": 331, "eos_token_id": [331, 4, 6]},
}


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("case", GENERATION)
def test_generation_config(case, family, tmp_path):
    """Greedy and beams, token by token."""
    ends = GENERATION[case] | ({"decoder_start_token_id": 2} if family == "bart" else {})
    make = llama if family == "llama" else partial(bart, vocab_size=340, eos_token_id=331, forced_eos_token_id=None)
    theirs = make(tmp_path, seed=1)
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    theirs = type(theirs).from_pretrained(tmp_path)
    ours = model.hub.load(tmp_path)
    said = read_generation_config(tmp_path, ours.config)
    ids = torch.randint(8, 99, (1, 1 if case == "forced first" else 6))
    penalty = said.defaults.get("repetition_penalty", 1.0)
    common = {"max_new_tokens": 12, "stop_ids": said.stop_ids, "constraints": said.constraints, "repetition_penalty": penalty}
    start = 1 if family == "bart" else ids.size(1)
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "max_length": None}
        options |= {"eos_token_id": list(said.stop_ids)} if "eos_token_id" not in ends else {}
        expected = theirs.generate(ids, **options)[0, start:].tolist()
        if beams == 1:
            got = generate(ours, ids, temperature=0, **common)[0].tolist()
        else:
            got = beam_search(ours, ids, beams=beams, **common).tokens[0, 0].tolist()
        assert got == expected[: len(got)] and not any(expected[len(got) :]), beams


def test_generation_config_read_and_written(tmp_path):
    """All ends, defaults and what is not read; a folder of transformers 4 says the same in config.json; kept when written."""
    theirs = llama(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    config = model.hub.load(tmp_path / "base").config
    assert read_generation_config(tmp_path / "base", config).stop_ids == (331,)
    change_json(tmp_path / "base" / "config.json", no_repeat_ngram_size=3, num_beams=4, forced_bos_token_id=0)
    old = read_generation_config(tmp_path / "base", model.hub.load(tmp_path / "base").config)
    assert (old.constraints.no_repeat_ngram, old.defaults, old.constraints.forced_first) == (3, {"beams": 4}, 0)
    raw = {"eos_token_id": [331, 5], "pad_token_id": 7, "temperature": 0.6, "top_p": 0.9, "typical_p": 0.2, "custom": {"a": 1}}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(raw))
    network = model.hub.load(tmp_path / "base")
    said = read_generation_config(tmp_path / "base", network.config)
    assert (said.stop_ids, said.pad_id, said.unsupported) == ((331, 5), 7, ("typical_p",))
    assert said.defaults == {"temperature": 0.6, "top_p": 0.9} and not said.constraints.no_repeat_ngram
    whole = parse_generation_config(dict.fromkeys(LIMITS, 5.0), network.config, {}).constraints
    assert {type(n) for n in (whole.min_length, whole.min_new_tokens, whole.no_repeat_ngram)} == {int}
    for name in LIMITS:
        with pytest.raises(ValueError, match=rf"{name}=2\.7 is not a whole number"):
            parse_generation_config({name: 2.7}, network.config, {})
    model.hub.save(network, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == raw
    own = randomized(tiny_config("llama", stop_ids=(5,)), dtype=torch.float32)
    model.hub.save(own, tmp_path / "own")
    assert theirs.generation_config.eos_token_id == 331
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "own").eos_token_id == [2, 5]
    for wrong in ({"eos_token_id": "</s>"}, {"temperature": "hot"}, [1]):
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(HubError, match=r"generation_config\.json"):
            model.hub.load(tmp_path / "base")


def test_nothing_of_config_json_is_dropped(tmp_path):
    """Fields that no table knows, names of labels and problem_type come back; with other labels they would be wrong."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    names = {"id2label": {0: "sad", 1: "glad", 2: "mad"}, "label2id": {"sad": 0, "glad": 1, "mad": 2}}
    settings = {"problem_type": "multi_label_classification", "classifier_dropout": 0.3, "finetuning_task": "moods"}
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **names, **settings))
    theirs.save_pretrained(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", auto_map={"AutoModel": "x.Y"}, torch_dtype="float16")
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    network = model.hub.load(tmp_path / "base")
    assert network.config.labels == 3
    model.hub.save(network, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key for key in before if after.get(key) != before[key]} <= {"torch_dtype", "transformers_version", "dtype"}
    assert after["dtype"] == "float32" and "torch_dtype" not in after
    model.hub.save(model.hub.load(tmp_path / "base", head="sequence", labels=2), tmp_path / "two")
    two = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (
        two["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"} and "problem_type" not in two and two["finetuning_task"] == "moods"
    )
    model.hub.save(model.hub.load(tmp_path / "base", head="none"), tmp_path / "body")
    model.hub.save(model.hub.load(tmp_path / "body", head="sequence", labels=3), tmp_path / "again")
    assert "head" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_an_index_that_outlived_its_shards(tmp_path):
    """Both there: one file is read, as transformers reads it, and that is said; shards that are missing are named."""
    theirs = llama(tmp_path)
    other = {name: value + 1 for name, value in load_file(tmp_path / "model.safetensors").items()}
    shard, index = "model-00001-of-00001.safetensors", tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, shard)}))
    for there in (False, True):
        if there:
            save_file(other, tmp_path / shard, metadata={"format": "pt"})
        with pytest.warns(
            UserWarning, match=r"model\.safetensors is read, as transformers reads it, not what .*index\.json names"
        ):
            ours = model.hub.load(tmp_path)
        ids = torch.randint(0, 340, (1, 9))
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
        assert torch.allclose(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(model.hub.load(tmp_path).body.norm.weight, ours.body.norm.weight + 1)
    index.rename(tmp_path / "elsewhere")
    with pytest.raises(
        HubError, match=r"holds shards \(model-00001-of-00001\.safetensors …\) and no model\.safetensors\.index"
    ):
        model.hub.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_git_lfs_pointers(name, tmp_path):
    llama(tmp_path)
    write_tokenizer(tmp_path, byte_level(SPECIALS), SPECIALS)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    with pytest.raises((HubError, DataError), match=rf"{name}:? .*Git LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path) if name == "tokenizer.json" else model.hub.load(tmp_path)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("two", [True, False], ids=["two matrices", "one matrix"])
def test_t5_as_transformers_5_writes_it(two, scaled, tmp_path, parity):
    """tie_word_embeddings is true always; the scale has a flag, and the file tells whether there is a second matrix."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, tie_word_embeddings=scaled, feed_forward_proj="gated-gelu")
    assert config.tie_word_embeddings and config.scale_decoder_outputs == scaled
    theirs = transformers.T5ForConditionalGeneration(config).double().eval()
    theirs.save_pretrained(tmp_path / "base")
    if two:
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(61, 24, dtype=torch.float64)
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(3, 61, (2, 7))
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    ours = model.hub.load(tmp_path / "base")
    assert (ours.config.tie_embeddings, ours.config.scale_head) == (not two, scaled)
    model.hub.save(ours, tmp_path / "out")
    again, back = model.hub.load(tmp_path / "out"), type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    expected = theirs(ids, decoder_input_ids=ids).logits
    errors = [relative(each(ids, decoder_input_ids=ids).logits, expected) for each in (ours, again, back)]
    assert errors[2] == 0
    parity(
        "T5 folders of transformers 5", LIBRARY, max(errors), 1e-5, "transformers casts RMS norms to float32, also in float64"
    )


def test_bart_with_stacks_of_different_sizes(tmp_path, parity):
    theirs = bart(tmp_path / "base", decoder_attention_heads=8, decoder_ffn_dim=40, decoder_layers=3).double()
    theirs.save_pretrained(tmp_path / "base")
    ours = model.hub.load(tmp_path / "base")
    assert (ours.config.heads, ours.config.second_stack.heads, ours.config.second_stack.mlp_width) == (4, 8, 40)
    model.hub.save(ours, tmp_path / "out")
    assert model.hub.load(tmp_path / "out").config == ours.config
    ids = torch.randint(3, 99, (2, 9))
    expected = theirs(ids, decoder_input_ids=ids[:, :5]).logits
    error = relative(ours(ids, decoder_input_ids=ids[:, :5]).logits, expected)
    parity("BART with stacks of different sizes", LIBRARY, error, 1e-12, "float64 rounding; sums in another order")
    written = theirs.generate(ids, do_sample=False, max_new_tokens=9, forced_eos_token_id=None)[:, 1:]
    assert torch.equal(generate(ours, ids, max_new_tokens=9, temperature=0, eos_id=2)[:, : written.size(1)], written)
    with pytest.raises(ConfigError, match="width=32 is not divisible by decoder_heads=5"):
        ours.config.replace(decoder_heads=5)
    for unusual in ({"kv_heads": 2}, {"free_head_width": 4}, {"position": "relative"}):
        with pytest.raises(ConfigError, match="decoder_heads=8: each stack needs kv_heads = heads, width / heads wide"):
            ours.config.replace(**unusual)


def test_a_tokenizer_with_more_ids_than_the_network_has_rows(tmp_path):
    """It opens; only an id that occurs and has no row is an error, which says what gives it one."""
    llama(tmp_path / "base", vocab_size=332)
    ids = write_tokenizer(tmp_path / "base", byte_level(SPECIALS, "<s>"), SPECIALS, bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(tmp_path / "base", 332)
    fox = tokenizer.encode("The fox")
    assert tokenizer.with_special_tokens(fox) == [330, *fox] and ids["<|x|>"] == 332
    with pytest.raises(
        DataError, match=r"'<\|x\|>' has id 332, and the network's vocabulary ends with 331: .* --vocab-size 333"
    ):
        tokenizer.encode("a <|x|>", parse_special=True)
    assert tokenizer.encode("a <|x|>")  # in letters


@pytest.mark.parametrize("family", [family for family in TINY_FAMILIES if family != "vaswani"])
def test_resized_vocabulary(family, tmp_path, parity):
    """Old rows stay, new ones are their mean, in the head too; transformers opens the result with the same logits."""
    network = randomized(tiny_config(family), dtype=torch.float64)
    old = {name: value.detach().clone() for name, value in network.named_parameters()}
    larger = resize_vocabulary(network, 67)
    assert larger.config.vocab_size == larger.body.embedding.num_embeddings == 67
    for name, value in larger.named_parameters():
        if name in ("body.embedding.weight", "head.weight"):
            assert torch.equal(value[:61], old[name]) and torch.allclose(
                value[61:], old[name].mean(0).expand(6, -1), atol=1e-14
            )
        elif name == "head.bias":
            expected = torch.zeros(6, dtype=torch.float64) if family == "bart" else old[name].mean().expand(6)
            assert torch.equal(value[:61], old[name]) and torch.allclose(value[61:], expected, atol=1e-14)
        else:
            assert torch.equal(value, old[name])
    assert (larger.head.weight is larger.body.embedding.weight) == larger.config.tie_embeddings
    model.hub.save(larger, tmp_path)
    kind = {"decoder": "CausalLM", "encoder": "MaskedLM", "encoder-decoder": "Seq2SeqLM"}[larger.config.architecture]
    theirs, ids = (
        getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path, dtype=torch.float64),
        torch.tensor([[5, 66, 7]]),
    )
    second = {"decoder_input_ids": ids} if kind == "Seq2SeqLM" else {}
    error = mixed(larger(ids, **second).logits, theirs(ids, **second).logits)
    parity(f"larger vocabulary: {family}", LIBRARY, error, 1e-5, "as shipped: transformers casts some tables to float32")
    smaller = resize_vocabulary(larger, 60)
    assert torch.equal(smaller.body.embedding.weight, old["body.embedding.weight"][:60])
    first = {name: each[:, :1] for name, each in ({"input_ids": ids} | second).items()}
    assert smaller(**first).logits.size(-1) == 60


SCALINGS = [  # rope_scaling, max_position_embeddings, and the longest text that it stands for
    ({"rope_type": "linear", "factor": 4.0}, 64, 256),
    ({"rope_type": "dynamic", "factor": 4.0}, 64, 256),
    ({"rope_type": "yarn", "factor": 4.0}, 64, 256),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),  # Qwen2.5: the trained length
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),  # DeepSeek: the extended one
    ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64}, 256, 256),  # Llama 3.1 names the extended one, which is not factor times 64
]  # fmt: skip


@pytest.mark.parametrize("scaling, named, longest", SCALINGS)
def test_scaled_contexts_are_read_to_their_end(scaling, named, longest, tmp_path):
    theirs = llama(tmp_path / "base", max_position_embeddings=named, rope_scaling=dict(scaling), eos_token_id=None).double()
    ours = model.hub.load(tmp_path / "base", dtype=torch.float64)
    assert ours.config.context == longest
    model.hub.save(ours, tmp_path / "out")
    assert model.hub.load(tmp_path / "out").config == ours.config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == named
    ids = torch.randint(3, 330, (1, longest - 9))
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)[0, ids.size(1) :]
    assert torch.equal(generate(ours, ids, max_new_tokens=8, temperature=0)[0], expected)


def test_every_file_beside_the_weights_travels(tmp_path):
    llama(tmp_path / "base")
    kept = ["chat_template.jinja", "README.md", "vocab.json", "merges.txt", "labels.txt", "LICENSE", "generation_config.json"]
    kept += ["additional_chat_templates/tools.jinja", "1_Pooling/config.json", "modules.json"]
    left = ["pytorch_model.bin", "model.onnx", "state.json", ".hidden", "optimizer.safetensors", "x.gguf", "runs/metrics.jsonl"]
    for name in (*kept, *left):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("x")
    (tmp_path / "base" / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../base"}]')
    assert {str(path.relative_to(tmp_path / "base")) for path in auxiliary_files(tmp_path / "base")} == set(kept)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    copied = copy_auxiliary_files(tmp_path / "base", tmp_path / "out")
    assert set(copied) == set(kept) - {"README.md"} and (tmp_path / "out" / "README.md").read_text() == "mine"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "x"
    shutil.rmtree(tmp_path / "base")


AROUND = {"BertTokenizer": ((330,), (331,)), "T5TokenizerFast": ((), (331,)), "PreTrainedTokenizerFast": ((), ())}


@pytest.mark.parametrize("kind", AROUND)
def test_what_a_class_puts_around_a_text(kind, tmp_path):
    """Where tokenizer.json has no post-processor; so those classes of transformers have it."""
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    write_tokenizer(tmp_path, byte_level(SPECIALS), SPECIALS, **settings)
    tokenizer = load_tokenizer(tmp_path)
    (before, after), ids = AROUND[kind], tokenizer.encode("the fox")
    assert tokenizer.affixes == (before, after) and tokenizer.with_special_tokens(ids) == [*before, *ids, *after]
