"""Entity F1 of sequence tagging: precision, recall and F1 of typed spans in IOB2, IOBES or BILOU tags, with seqeval's values.

`B-PER` begins an entity of type PER, `I-PER` continues it, `O` is outside. IOBES writes the last token of an entity as `E-PER`,
and the only one as `S-PER`; BILOU the same with the letters L and U. An entity is correct if its first token, last token and
type are. Predicted tags need not fit together; two readings of those that do not:

- "lenient": any run of tags that continue one another is an entity; conlleval's reading, and seqeval's default (which knows no
  BILOU: it is read as IOBES)
- "strict": only what is written in full is one, from B to the last I before another tag, or from B to E, or S alone; seqeval's
  with mode="strict" and the scheme

Averages over types are those of `eval.rates`, over the types with an entity on either side. B sentences, N tokens flattened,
U types, M entities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from eval.classification import IGNORED
from eval.rates import RATES, average_rates, check_rates, precision_recall_f1
from eval.score import Score, corpus_value, signature_of

MODES = ("lenient", "strict")
OUTSIDE, BEGIN, INSIDE, END, SINGLE = range(5)
SCHEMES = {"IOB2": "OBI", "IOBES": "OBIES", "BILOU": "OBILU"}  # the letter of each kind
Tags = Sequence[Sequence[str]] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Entities:
    """Settings of entity F1, from 0 to 1. `tags` are all tags; a tag id is its index.

    `mode` is "lenient" or "strict"; `average` "micro", "macro" or "weighted"; `scheme` "IOB2", "IOBES" or "BILOU". Errors: tags
    that are not of the scheme, a repeated tag, an unknown name (ValueError). Statistics of a sentence: references (1), then
    correct, predicted, true entities per type.
    """

    tags: tuple[str, ...]
    mode: str = "lenient"
    average: str = "micro"
    zero_division: float = 0.0
    scheme: str = "IOB2"

    name: ClassVar[str] = "entity F1"
    is_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rates(self.average, self.zero_division)
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: one of {', '.join(MODES)}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r}: one of {', '.join(SCHEMES)}")
        object.__setattr__(self, "tags", tuple(self.tags))
        for tag in self.tags:
            _kind_and_type(tag, self.scheme)
        if len(set(self.tags)) < len(self.tags):
            raise ValueError(f"a tag comes twice among {', '.join(self.tags)}")

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(sorted({_kind_and_type(tag, self.scheme)[1] for tag in self.tags if tag != "O"}))

    def statistics(self, hypotheses: Tags, references: Sequence[Tags]) -> Tensor:
        """Compute the statistics (B, 1 + 3 U) of B predicted sentences and one stream of true ones.

        Tokens with true id -100 (true tag None) are removed from both sides first. Errors: several streams, unequal numbers or
        lengths of sentences, tags or ids outside `tags`.
        """
        if len(references) != 1:
            raise ValueError(f"{len(references)} streams of true tags: a sentence has one tagging")
        predicted_N, true_N, sentence_N = self._ids(hypotheses, references[0])
        kind_V, type_V = self._tables(true_N.device)
        sentences, types = len(hypotheses), len(self.types)
        strict = None if self.mode == "lenient" else self.scheme
        predicted_type_N, true_type_N = type_V[predicted_N], type_V[true_N]
        first_M, last_M = entity_spans(kind_V[predicted_N], predicted_type_N, sentence_N, strict=strict)
        true_first_M, true_last_M = entity_spans(kind_V[true_N], true_type_N, sentence_N, strict=strict)
        last_N = torch.full_like(true_N, -1)
        last_N[true_first_M] = true_last_M
        is_correct_M = (last_N[first_M] == last_M) & (true_type_N[first_M] == predicted_type_N[first_M])
        found = ((predicted_type_N, first_M[is_correct_M]), (predicted_type_N, first_M), (true_type_N, true_first_M))
        counts = [
            torch.bincount(sentence_N[first_M] * types + type_N[first_M], minlength=sentences * types)
            for type_N, first_M in found
        ]
        count_BK = torch.stack(counts, -1).view(sentences, types * 3)
        return torch.cat([count_BK.new_ones(sentences, 1), count_BK], 1)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return lookup tables over tags: the kind, and the index of the type in `types` (-1 for O)."""
        kinds, names = zip(*(_kind_and_type(tag, self.scheme) for tag in self.tags), strict=True) if self.tags else ((), ())
        places = {name: place for place, name in enumerate(self.types)}
        types = [-1 if kind == OUTSIDE else places[name] for kind, name in zip(kinds, names, strict=True)]
        return tuple(torch.tensor(table, dtype=torch.int64, device=device) for table in (kinds, types))

    def _ids(self, predicted: Tags, true: Tags) -> tuple[Tensor, Tensor, Tensor]:
        """Return flattened predicted and true tag ids of the tokens that count, and the sentence of each."""
        predicted_N, lengths = self._flatten(predicted, "predicted")
        true_N, true_lengths = self._flatten(true, "true")
        if len(lengths) != len(true_lengths):
            raise ValueError(f"{len(lengths)} predicted sentences, but {len(true_lengths)} true ones")
        for sentence, (length, true_length) in enumerate(zip(lengths, true_lengths, strict=True)):
            if length != true_length:
                raise ValueError(f"sentence {sentence} has {length} predicted tags, but {true_length} true ones")
        true_N = true_N.to(predicted_N.device)
        sentence_N = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(true_N.device)
        is_counted_N = true_N != IGNORED
        for name, ids_N in (("predicted", predicted_N), ("true", true_N)):
            is_wrong_N = is_counted_N & ((ids_N < 0) | (ids_N >= len(self.tags)))
            if bool(is_wrong_N.any()):
                at = int(is_wrong_N.nonzero()[0])
                where = f"{name} id {int(ids_N[at])} in sentence {int(sentence_N[at])}"
                raise ValueError(f"{where} is not one of the {len(self.tags)} tags")
        return predicted_N[is_counted_N], true_N[is_counted_N], sentence_N[is_counted_N]

    def _flatten(self, sentences: Tags, name: str) -> tuple[Tensor, list[int]]:
        if isinstance(sentences, str) or any(isinstance(sentence, str) for sentence in sentences):
            raise TypeError(f"{name} tags are sentences, lists of tags, got a string among them")
        if isinstance(sentences, Tensor):
            if sentences.ndim != 2 or sentences.is_floating_point():
                raise TypeError(f"{name} ids are (B, T) integers, got {tuple(sentences.shape)} {sentences.dtype}")
            return sentences.flatten().long(), [sentences.shape[1]] * len(sentences)
        lengths = [len(sentence) for sentence in sentences]
        flat = chain.from_iterable(s.tolist() if hasattr(s, "tolist") else s for s in sentences)
        flat = [IGNORED if tag is None else tag for tag in flat]
        if any(isinstance(tag, str) for tag in flat):
            places = {tag: place for place, tag in enumerate(self.tags)} | {IGNORED: IGNORED}
            if unknown := [tag for tag in flat if tag not in places]:
                raise ValueError(f"{name} tag {unknown[0]!r} is not one of {', '.join(self.tags)}")
            flat = [places[tag] for tag in flat]
        ids = np.array(flat) if flat else np.zeros(0, np.int64)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"{name} tags are strings or integer ids, got {ids.dtype}")
        return torch.from_numpy(ids.astype(np.int64)), lengths

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return self._average(statistics_XK)[..., RATES.index("f1")]

    def examples(self, statistics_BK: Tensor) -> Tensor:
        """Micro F1 of each sentence, (B,); 1 if neither side has an entity."""
        return replace(self, average="micro", zero_division=1.0).scores(statistics_BK)

    def _average(self, statistics_XK: Tensor) -> Tensor:
        counts_XU3 = statistics_XK[..., 1:].unflatten(-1, (len(self.types), 3))
        return average_rates(counts_XU3, self.average, self.zero_division, only_met=True)

    def score(self, statistics_BK: Tensor) -> Score:
        """Score the corpus. Parts: averages precision, recall, f1; correct, predicted, true; `types`: these six per type."""
        counts_U3 = statistics_BK.sum(0)[1:].view(len(self.types), 3)
        names = (*RATES, "correct", "predicted", "true")
        found = zip(self.types, precision_recall_f1(counts_U3, self.zero_division).tolist(), counts_U3.tolist(), strict=True)
        types = {name: dict(zip(names, [*three, *counts], strict=True)) for name, three, counts in found if any(counts)}
        means = self._average(statistics_BK.sum(0)).tolist()
        parts = dict(zip(names, [*means, *counts_U3.sum(0).tolist()], strict=True)) | {"types": types}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"sentences": len(statistics_BK)} | resampling
        settings |= {"scheme": self.scheme, "mode": self.mode, "average": self.average}
        return signature_of(settings | {"types": len(self.types), "zero_division": f"{self.zero_division:g}"})


def find_entities(tags: Sequence[str], scheme: str | None = None, **settings: object) -> Entities | None:
    """Return the entity metric of these tags in a scheme; None: in the first scheme that has all of them, if one has.

    Also None for tags without a type of entity: "O" alone. Errors (ValueError): tags that are not of the given scheme.

    >>> find_entities(["O", "B-PER", "E-PER"]).scheme, find_entities(["NOUN", "VERB"])
    ('IOBES', None)
    """
    for name in SCHEMES if scheme is None else (scheme,):
        try:
            found = Entities(tuple(tags), scheme=name, **settings)
        except ValueError:
            if scheme is not None:
                raise
            continue
        return found if found.types else None
    return None


def entity_spans(kind_N: Tensor, type_N: Tensor, sentence_N: Tensor, *, strict: str | None) -> tuple[Tensor, Tensor]:
    """Find the first and last token of each entity in flattened tags, (M,) and (M,), in order. `strict`: the scheme, or None.

    An `I-` or `E-` continues an entity if the tag before it is a `B-` or `I-` of the same type in the same sentence. Each run
    of such tags is an entity. Strict reading: if it begins with `B-` or `S-`, and (but for IOB2) ends with `E-` or `S-`.
    """
    is_inside_N = kind_N != OUTSIDE
    is_continued_N = (kind_N == INSIDE) | (kind_N == END)
    is_continued_N[:1] = False
    is_open_N = (kind_N == BEGIN) | (kind_N == INSIDE)
    is_continued_N[1:] &= is_open_N[:-1] & (type_N[1:] == type_N[:-1]) & (sentence_N[1:] == sentence_N[:-1])
    is_last_N = is_inside_N & ~torch.cat([is_continued_N[1:], is_continued_N.new_zeros(1)])[: len(kind_N)]
    first_M, last_M = ((is_inside_N & ~is_continued_N).nonzero().squeeze(1), is_last_N.nonzero().squeeze(1))
    if strict is not None:
        is_whole_M = (kind_N[first_M] == BEGIN) | (kind_N[first_M] == SINGLE)
        if strict != "IOB2":
            is_whole_M &= (kind_N[last_M] == END) | (kind_N[last_M] == SINGLE)
        first_M, last_M = first_M[is_whole_M], last_M[is_whole_M]
    return first_M, last_M


def _kind_and_type(tag: str, scheme: str) -> tuple[int, str]:
    """Split a tag: `B-PER` is (BEGIN, "PER"). A type may contain hyphens; a tag without one has "_", as in seqeval."""
    prefix, _, type_ = tag.partition("-")
    letters = SCHEMES[scheme]
    if len(prefix) != 1 or prefix not in letters or (prefix == "O") != (tag == "O"):
        forms = ", ".join(f"{letter}-TYPE" for letter in letters[1:])
        raise ValueError(f"tag {tag!r} is not an {scheme} tag (O, {forms})")
    return letters.index(prefix), type_ or "_"


def entity_scores(predicted_tags: Tags, true_tags: Tags, *, tags: Sequence[str] | None = None, **settings: object) -> Score:
    """Entity-level F1 of B tagged sentences, from 0 to 1: F1 = 2 correct / (predicted + true), with seqeval's values.

    Sentences are lists of IOB2, IOBES or BILOU tags, or of ids with `tags` giving the tag of each id. Tensors (B, T) of ids
    have -100 in `true_tags` at padding. Settings are those of `Entities`: mode="lenient" or "strict", average, zero_division,
    scheme. Parts: precision, recall, f1, correct, predicted, true, and the same for each type. Errors: those of `Entities` and
    its `statistics`.
    Source: conlleval (Tjong Kim Sang & De Meulder 2003); seqeval.

    >>> score = entity_scores([["B-PER", "I-PER", "O", "I-LOC"]], [["B-PER", "I-PER", "O", "B-LOC"]], mode="strict")
    >>> print(score, score.precision, score.recall)
    entity F1 = 0.6667 sentences:1|scheme:IOB2|mode:strict|average:micro|types:2|zero_division:0 1.0 0.5
    """
    if tags is None:
        if isinstance(predicted_tags, Tensor) or isinstance(true_tags, Tensor):
            raise TypeError("sentences are tensors of ids: pass their `tags`")
        tags = set(chain.from_iterable(chain(predicted_tags, true_tags))) - {None}
        if ids := [tag for tag in tags if not isinstance(tag, str)]:
            raise TypeError(f"sentences hold ids, such as {ids[0]!r}: pass their `tags`")
        tags = sorted(tags)
    metric = Entities(tuple(tags), **settings)
    return metric.score(metric.statistics(predicted_tags, [true_tags]))


entities = entity_scores  # the name of the last version
