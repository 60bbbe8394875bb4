"""The data pipeline, text in, batches out: read, clean, tokenize, label, pack.

    config      the data options, the entries of --corpus, and the error for bad input     imports the standard library only
    sources/    files, records, shards, mixtures: the origin of text and examples
    corpus/     documents of built-in corpora and of files; deduplication; the validation split; prepare builds the shards
    tokenizer/  one interface to all tokenizers
    example     one example: ids and labels, before packing
    transforms/ labels for causal, masked and sequence-to-sequence modelling, and for classes; special tokens around texts
    packing/    examples, or blocks of tokens, -> rows of a batch; the batch of a step is a pure function of (seed, step)
    chat/       conversations and preferences: record shapes, chat templates, which tokens are learned
    made/       labelled data sets made from Python's standard library, and tasks with computed answers
    commands/   commands of `python -m data`
    prefetch    batches made ahead, in a thread
    sizes       bytes of the text behind a range of tokens
    notes       lines on text that was skipped, repaired or not encodable
    shell messages  quoted commands; counts with their nouns and shortened lists, in messages

`python -m data prepare` builds the shards and prints their sizes; `python -m data task NAME` makes a labelled data set;
`python -m data preview FILE` shows which tokens of conversations are learned; `python -m data pairs FILE` makes pairs of
replies; `self-instruct` and `replies` let a network write instructions, or the best of several replies (train/synthetic).
In reading order: sources/find, sources/files, corpus/ingest, corpus/dedup, tokenizer/base, tokenizer/bpe, corpus/prepare,
sources/shards, packing/blocks, transforms/causal, transforms/masked, transforms/seq2seq.
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from data import load_tokenizer` is the stable interface
    "chat.conversation": ("Conversation", "Plain"),
    "chat.encode": ("ChatEncoder", "encode_chat"),
    "chat.encode_preference": ("EncodedReplies", "encode_replies", "pair_examples"),
    "chat.preferences": ("Preference", "Rated", "read_preference", "read_rated", "read_rated_all"),
    "chat.prompts": ("PromptRecord", "read_prompt"),
    "chat.template": ("ChatTemplate", "open_template"),
    "chat.shapes": ("read_chat_record",),
    "config": ("DataConfig", "DataError"),
    "corpus.dedup": ("deduplicate", "find_covered", "shingle_overlap"),
    "corpus.prepare": ("prepare",),
    "example": ("Example",),
    "packing.blocks": ("BlockStream", "MixedBlocks", "sequential_blocks"),
    "packing.collate": ("pack_batch", "pad_batch"),
    "packing.examples": ("ExampleSource",),
    "packing.first_fit": ("fill_ratio", "first_fit"),
    "packing.length_groups": ("group_by_length",),
    "packing.mixed": ("MixedExamples",),
    "prefetch": ("Prefetcher",),
    "sources.mixture": ("Mixture",),
    "sources.shards": ("Shards", "Split", "open_shards"),
    "tokenizer.base": ("Affixes", "Tokenizer"),
    "tokenizer.bpe": ("encode_bpe", "train_bpe"),
    "tokenizer.open": ("load_tokenizer",),
    "tokenizer.sentencepiece": ("SentencePieceTokenizer",),
    "tokenizer.tokenizer_json": ("JsonTokenizer",),
    "tokenizer.training": ("train_tokenizer",),
    "transforms.answers": ("answer_windows", "window_labels"),
    "transforms.causal": ("clm_batch",),
    "transforms.denoise": ("denoise_batch",),
    "transforms.framing": ("Framer",),
    "transforms.masked": ("mlm_batch", "unigram_baseline"),
    "transforms.seq2seq": ("encode_text", "seq2seq_example"),
    "transforms.span": ("corrupt_spans", "draw_noise_mask", "span_batch"),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
