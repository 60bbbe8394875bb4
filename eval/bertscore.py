"""BERTScore: how near each token's vector is to the nearest one of the other text.

    P = Σ over hypothesis tokens of w · (largest cosine with a token of the reference)      weights w of a text add up to 1
    R = Σ over reference tokens of w · (largest cosine with a token of the hypothesis)      F = 2 P R / (P + R)

Vectors are an encoder's after `layer` blocks. Tokens that begin and end a text ([CLS], [SEP]) have weight 0 but may be matched.
Without idf all others weigh the same; with it log((M + 1) / (df + 1)), where df of M references hold the token. A baseline b
makes x into (x - b) / (1 - b). Values are bert-score's 0.3.13, except that

- a largest cosine is one of real tokens; there it is at least 0 in a text that is padded beside longer ones
- a pair one side of which has no token of any weight (an empty text) has P = R = F = 0; there it is not a number, or a crash
- T5's </s> is a special token as others are; there it is weighed as a word
- text never makes a special token: "[SEP]" in a text is five characters

Source: Zhang et al. 2020, arXiv 1904.09675.
"""

import copy
import csv
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval.notes import Notes, notice
from eval.padding import batches, places
from eval.score import Score, check_each_has_one, check_streams, corpus_value, exact_mean, f_measure, ratio

BERT_SCORE = "0.3.13"  # whose values these are
CHUNK = 32  # batches of text whose vectors are held at once
UNKNOWN = 0.005  # of the tokens, from which on it is said


@dataclass(frozen=True, eq=False)
class BertScore:
    """Settings of BERTScore.

    - network: an encoder, or what has one (`network.body`, `body.encoder`); called with ids and mask (None: no padding), it
      gives `hidden_states`. Where its `blocks` are seen, no more than `layer` of them are run, and the stack's last norm,
      where it has one, follows, as in bert-score. It must be in eval mode. A decoder is refused.
    - tokenizer: `encode`, `bos_id`, `eos_id`; where these two are one, it stands at the end alone
    - layer: how many blocks; 0 is the embedding, None all of them
    - idf: True takes the references of the call. For a corpus in pieces, or another one, give a mapping: `idf_weights`.
      A token that all references hold has weight 0: of one reference all do. `statistics` says of how many texts
    - baseline: a file of bert-score's, `LAYER,P,R,F` and a row a layer
    - max_length: ids that a text is cut to, special tokens included; None is the network's context, where it says one. What is
      cut off is not compared: `statistics` says of how many texts
    - model: the name that the signature says
    - batch_tokens: padded tokens at a time; memory follows it, not the corpus

    Statistics of an example: references, P, R, F. Of several references the largest P, R and F each, as in bert-score.
    """

    network: Callable
    tokenizer: object
    layer: int | None = None
    idf: bool | Mapping[int, float] = False
    baseline: str | Path | None = None
    max_length: int | None = None
    model: str | None = None
    batch_tokens: int = 2048
    progress: bool = False

    encoder: Callable = field(init=False, repr=False)
    baseline_3: Tensor = field(init=False, repr=False)

    name: ClassVar[str] = "BERTScore"
    mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        encoder, layer = first_blocks(self.network, self.layer)
        context = getattr(getattr(self.network, "config", None), "context", None)
        source = getattr(self.network, "source", None)
        found = {"encoder": encoder, "layer": layer}
        found["max_length"] = context if self.max_length is None else self.max_length
        found["model"] = (source.name if source else "unnamed") if self.model is None else self.model
        found["baseline_3"] = torch.zeros(3) if self.baseline is None else read_baseline(self.baseline, layer)
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens}: a batch has one token at least")
        if found["max_length"] is not None and found["max_length"] < 3:
            raise ValueError(f"max_length={found['max_length']}: two special tokens leave no room for a text")
        if context is not None and found["max_length"] > context:
            raise ValueError(f"max_length={found['max_length']} is more than the network's context={context}")
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, notes: Notes | None = None
    ) -> Tensor:
        check_streams(hypotheses, references)
        check_each_has_one(references)
        idf = self.idf
        if idf is True:
            idf = idf_weights(references, self.tokenizer, max_length=self.max_length)
        best_B3, found = torch.full((len(hypotheses), 3), -math.inf, dtype=torch.float64), Counter()
        for pairs in self._chunks(hypotheses, references):
            example_P3 = torch.tensor(pairs.examples)[:, None].expand(-1, 3)
            best_B3.scatter_reduce_(0, example_P3, self._matched(pairs, idf), "amax")
            for number in [*dict(zip(pairs.examples, pairs.hypotheses, strict=True)).values(), *pairs.references]:
                found.update(pairs.counts[number])
            if self.progress:
                done = pairs.examples[-1] + 1
                print(f"\r{done:,} of {len(hypotheses):,}", end="\n" * (done == len(hypotheses)), file=sys.stderr, flush=True)
        there = [sum(text is not None for text in found) for found in zip(*references, strict=True)]
        notice("cut", partial(describe_cut, self.max_length), found, notes)
        notice("unknown", describe_unknown, found, notes)
        notice("idf", describe_weightless, found, notes)
        count_B1 = torch.tensor(there, dtype=torch.float64)[:, None]
        return torch.cat([count_B1, (best_B3 - self.baseline_3) / (1 - self.baseline_3)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return statistics_XK[..., 3].double()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        names = ("precision", "recall", "fmeasure")
        parts = {name: exact_mean(statistics_BK[:, 1 + place]) for place, name in enumerate(names)}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampled: object) -> str:
        counts = statistics_BK[:, 0].long().unique().tolist()
        said = {"nrefs": counts[0] if len(counts) == 1 else "var"} | resampled
        said |= {"model": self.model, "layer": self.layer}
        said["idf"] = {True: "references", False: "no"}[self.idf] if isinstance(self.idf, bool) else "given"
        said |= {"baseline": "no" if self.baseline is None else Path(self.baseline).name, "special": "weight-0"}
        said |= {"max": self.max_length or "no", "version": f"bert-score-{BERT_SCORE}"}
        dtype = next((weight.dtype for weight in getattr(self.network, "parameters", list)()), torch.float32)
        said |= {} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}
        return "|".join(f"{name}:{value}" for name, value in said.items())

    def _chunks(self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> Iterator["Pairs"]:
        """All pairs in order, in pieces of a bounded number of tokens; a text comes once in a piece."""
        specials = 1 + (self.tokenizer.bos_id != self.tokenizer.eos_id)
        unknown_id = getattr(self.tokenizer, "unknown_id", None)
        pairs, tokens = Pairs([], [], [], {}, [], []), 0
        for example, (hypothesis, *found) in enumerate(zip(hypotheses, *references, strict=True)):
            for reference in found:
                if reference is None:
                    continue
                for text in (hypothesis, reference):
                    if text not in pairs.texts:
                        pairs.texts[text] = len(pairs.ids)
                        whole = token_ids(text, self.tokenizer)
                        ids = shortened(whole, self.max_length)
                        counts = {"texts": 1, "cut": len(ids) < len(whole), "tokens": len(ids) - specials}
                        pairs.counts.append(counts | {"unknown": ids.count(unknown_id)})
                        pairs.ids.append(ids)
                        tokens += len(ids)
                pairs.examples.append(example)
                pairs.hypotheses.append(pairs.texts[hypothesis])
                pairs.references.append(pairs.texts[reference])
            if tokens >= CHUNK * self.batch_tokens:
                yield pairs
                pairs, tokens = Pairs([], [], [], {}, [], []), 0
        if pairs.examples:
            yield pairs

    @torch.inference_mode()
    def _matched(self, pairs: "Pairs", idf: bool | Mapping[int, float]) -> Tensor:
        """P, R and F of each pair, (P, 3) float64; counts the texts without weight."""
        device = next((each.device for each in getattr(self.network, "parameters", list)()), None)
        length_U = torch.tensor([len(ids) for ids in pairs.ids], device=device)
        start_U = length_U.cumsum(0) - length_U
        ids_N = torch.tensor([id for ids in pairs.ids for id in ids], device=device)
        weight_N = self._weights(ids_N, start_U, length_U, idf)
        weight_U = torch.zeros_like(start_U, dtype=weight_N.dtype)
        weight_U.index_add_(0, torch.repeat_interleave(length_U), weight_N)
        for counts, weight in zip(pairs.counts, weight_U.tolist(), strict=True):
            counts["weightless"] = weight == 0 and counts["tokens"] > 0
        unit_ND = self._vectors(ids_N, start_U, length_U, list(pairs.texts))
        hypothesis_P, reference_P = (torch.tensor(side, device=device) for side in (pairs.hypotheses, pairs.references))
        matched_P3 = torch.zeros(len(hypothesis_P), 3, dtype=torch.float64, device=device)
        for some_B in batches(torch.maximum(length_U[hypothesis_P], length_U[reference_P]), self.batch_tokens):
            # Padding is the last token once more: it changes no maximum, and has its weight, 0.
            place_BT, _ = places(start_U, length_U, hypothesis_P[some_B])
            place_BS, _ = places(start_U, length_U, reference_P[some_B])
            cosine_BTS = unit_ND[place_BT] @ unit_ND[place_BS].mT
            nearest_BT, nearest_BS = cosine_BTS.amax(2), cosine_BTS.amax(1)
            weight_BT, weight_BS = weight_N[place_BT], weight_N[place_BS]
            total_BX = torch.stack([weight_BT.sum(1), weight_BS.sum(1)], 1)
            sums_BX = torch.stack([(weight_BT * nearest_BT).sum(1), (weight_BS * nearest_BS).sum(1)], 1)
            parts_BX = ratio(sums_BX, total_BX) * (total_BX > 0).all(1, keepdim=True)
            matched_P3[some_B] = torch.cat([parts_BX, f_measure(parts_BX[:, :1], parts_BX[:, 1:])], 1)
        return matched_P3.cpu()

    def _weights(self, ids_N: Tensor, start_U: Tensor, length_U: Tensor, idf: bool | Mapping[int, float]) -> Tensor:
        weight_N = torch.ones(ids_N.shape, dtype=torch.float64, device=ids_N.device)
        if idf is not False:
            known_K, which_N = ids_N.unique(return_inverse=True)
            specials = (self.tokenizer.bos_id, self.tokenizer.eos_id)
            try:
                weights = [0.0 if id in specials else float(idf[id]) for id in known_K.tolist()]
            except KeyError as error:
                raise ValueError(f"idf has no weight for id {error}") from None
            if not all(0 <= weight < math.inf for weight in weights):
                raise ValueError("idf: a weight is negative or not finite")
            weight_N = torch.tensor(weights, dtype=torch.float64, device=ids_N.device)[which_N]
        if self.tokenizer.bos_id != self.tokenizer.eos_id:
            weight_N[start_U] = 0
        weight_N[start_U + length_U - 1] = 0
        return weight_N

    def _vectors(self, ids_N: Tensor, start_U: Tensor, length_U: Tensor, texts: Sequence[str]) -> Tensor:
        """Each token's vector, of length 1, (N, D). Errors: one that is not finite (ValueError quotes the text)."""
        unit_ND = None
        for some_B in batches(length_U, self.batch_tokens):
            place_BT, real_BT = places(start_U, length_U, some_B)
            ids_BT = ids_N[place_BT]
            mask_BT = None if bool(real_BT.all()) else real_BT.long()
            hidden_BTD = self.encoder(ids_BT, mask_BT, hidden_states=True).hidden_states[self.layer]
            hidden_MD = hidden_BTD[real_BT].to(torch.promote_types(hidden_BTD.dtype, torch.float32))
            size_M1 = torch.linalg.vector_norm(hidden_MD, dim=-1, keepdim=True)
            if not bool(size_M1.isfinite().all()):
                row = int(real_BT.nonzero()[int((~size_M1.isfinite()).flatten().nonzero()[0]), 0])
                raise ValueError(f"the network has no finite vectors for the text {texts[int(some_B[row])][:80]!r}")
            if unit_ND is None:
                unit_ND = hidden_MD.new_empty(len(ids_N), hidden_MD.size(1))
            unit_ND[place_BT[real_BT]] = hidden_MD / size_M1.clamp(min=torch.finfo(size_M1.dtype).tiny)
        return unit_ND


class Pairs(NamedTuple):
    """Some pairs: example, and the numbers of both texts; each text once, its ids, and what is counted of it for notes."""

    examples: list[int]
    hypotheses: list[int]
    references: list[int]
    texts: dict[str, int]
    ids: list[list[int]]
    counts: list[dict[str, int]]


def describe_cut(max_length: int | None, found: Counter) -> str | None:
    return f"{found['cut']} of {found['texts']} texts are cut to {max_length} tokens" if found["cut"] else None


def describe_unknown(found: Counter) -> str | None:
    if found["unknown"] <= UNKNOWN * found["tokens"]:
        return None
    share = 100 * found["unknown"] / found["tokens"]
    return f"{share:.1f} % of the tokens are the unknown one, alike whatever the text is: take an encoder that knows its script"


def describe_weightless(found: Counter) -> str | None:
    if not found["weightless"]:
        return None
    return (
        f"idf: each token of {found['weightless']} of {found['texts']} texts weighs 0, as one does that all references hold "
        "(of one reference: all), and their pairs score 0. Take weights of a larger corpus (idf_weights), or score without idf"
    )


def bert_score(
    hypotheses: Sequence[str],
    references: Sequence,
    network: Callable,
    tokenizer: object,
    *,
    device: torch.device | str | None = None,
    **settings: object,
) -> Score:
    """BERTScore of a corpus, with the mean precision, recall and fmeasure of its examples as parts; settings: `BertScore`'s.

    `references` is one text for each hypothesis, or streams: `references[r][i]` is a reference of hypothesis i, or None.
    `device`: where the network is moved to first.
    """
    if not isinstance(references, str) and all(text is None or isinstance(text, str) for text in references):
        references = [references]
    if device is not None:
        network = network.to(device)
    metric = BertScore(network, tokenizer, **settings)
    return metric.score(metric.statistics(hypotheses, references))


def first_blocks(network: Callable, layer: int | None) -> tuple[Callable, int]:
    """(the encoder of `network` that ends after `layer` blocks, sharing its weights; the number of that layer)."""
    body = getattr(network, "body", network)
    stack = getattr(body, "encoder", body)
    if getattr(stack, "causal", False):
        raise ValueError("the network is a decoder, whose tokens see only what stands before them: BERTScore needs an encoder")
    if getattr(network, "training", False):
        raise ValueError("the network is in training mode, in which dropout is random: network.eval() first")
    if not hasattr(stack, "blocks"):
        if layer is None or layer < 0:
            raise ValueError(f"layer={layer}: the network does not show its blocks, so say how many layers, from 0")
        return network, layer
    depth = len(stack.blocks)
    layer = depth if layer is None else layer
    if not 0 <= layer <= depth:
        raise ValueError(f"layer={layer}: the encoder has layers 0 to {depth}")
    short = copy.copy(stack)
    short._modules = dict(stack._modules)  # else both would share the table of parts, and the whole one be cut
    short.blocks, short.layers = stack.blocks[:layer], stack.layers[:layer]
    return short, layer


def token_ids(text: str, tokenizer: object) -> list[int]:
    """begin, text, end."""
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, got {type(text).__name__}: {text!r:.80}")
    begin = [tokenizer.bos_id] if tokenizer.bos_id != tokenizer.eos_id else []
    return [*begin, *tokenizer.encode(text.strip()), tokenizer.eos_id]


def shortened(ids: list[int], max_length: int | None) -> list[int]:
    """At most `max_length` ids: a text that is too long loses its end, not the id after it.

    >>> shortened([1, 7, 8, 9, 2], 4)
    [1, 7, 8, 2]
    """
    return ids if max_length is None or len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]


def idf_weights(
    references: Sequence[Sequence[str | None]], tokenizer: object, *, max_length: int | None = None
) -> Mapping[int, float]:
    """id -> log((M + 1) / (df + 1)): df of all M references hold it. An id that none holds has log(M + 1)."""
    if isinstance(references, str) or any(isinstance(stream, str) for stream in references):
        raise TypeError("references are streams, [[first of example 0, first of example 1, …], …]: got a string among them")
    held, total = Counter(), 0
    for text in (text for stream in references for text in stream if text is not None):
        held.update(set(shortened(token_ids(text, tokenizer), max_length)))
        total += 1
    weights = {id: math.log((total + 1) / (count + 1)) for id, count in held.items()}
    return defaultdict(partial(float, math.log(total + 1)), weights)


def read_baseline(path: str | Path, layer: int) -> Tensor:
    """P, R and F of a layer, float64. Errors: no such layer, no such columns, what is no number below 1 (ValueError)."""
    lines = Path(path).read_text(encoding="utf-8").replace("\t", ",").splitlines()
    for row in csv.DictReader(lines):
        try:
            if int(row["LAYER"]) != layer:
                continue
            values = [float(row[part]) for part in "PRF"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a baseline, whose lines are LAYER,P,R,F and a row a layer; found {row}") from None
        if not all(value < 1 for value in values):
            raise ValueError(f"{path}: a baseline is below 1, that of layer {layer} is {values}")
        return torch.tensor(values, dtype=torch.float64)
    raise ValueError(f"{path} has no baseline of layer {layer}")


bertscore = bert_score  # the name that `eval.bertscore` has always offered
