"""BERTScore: each token is matched to the token of the other text with the largest cosine of contextual embeddings.

    P = Σ over hypothesis tokens of w · max over reference tokens of cosine      the weights w of a text sum to 1
    R = Σ over reference tokens of w · max over hypothesis tokens of cosine      F = 2 P R / (P + R)

Embeddings are an encoder's hidden states after `layer` blocks. Special tokens at the ends of a text ([CLS], [SEP]) have weight
0 but may be matched. Other tokens have equal weights, or with idf log((M + 1) / (df + 1)), where df of M references contain the
token. A baseline b rescales x to (x - b) / (1 - b). Values are those of bert-score 0.3.13, except:

- the maximum is over real tokens; there it is at least 0 for a text padded beside longer ones
- a pair with a side of zero total weight (an empty text) has P = R = F = 0; there it is NaN, or a crash
- T5's </s> is a special token like others; there it has the weight of a word
- text never makes a special token: "[SEP]" in a text is five characters

Source: Zhang et al. 2020, arXiv 1904.09675.
"""

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval.bertscore_inputs import idf_weights, read_baseline, token_ids, truncate
from eval.notes import Notes, note_or_warn
from eval.padding import padded_batches, padded_indices
from eval.score import (
    Score,
    check_has_reference,
    check_streams,
    corpus_value,
    exact_mean,
    f_measure,
    ratio,
    reference_count,
    signature_of,
)

BERT_SCORE_VERSION = "0.3.13"  # the release of bert-score whose values are reproduced
CHUNK = 32  # batches of text whose embeddings are held at once
MIN_UNKNOWN = 0.005  # fraction of unknown tokens from which on a note is made


@dataclass(frozen=True, eq=False)
class BertScore:
    """Settings of BERTScore; P, R and F are at most 1, F is the score.

    - network: an encoder, or a network with one (`network.body`, `body.encoder`), in eval mode. Called with ids and mask (None:
      no padding) it returns `hidden_states`. If its `blocks` are accessible, only `layer` of them are run, followed by the
      stack's final norm if it has one, as in bert-score. A decoder is refused.
    - tokenizer: has `encode`, `bos_id`, `eos_id`; if both ids are equal, only the end of a text gets it
    - layer: number of blocks; 0 is the embedding, None all blocks
    - idf: True takes the references of the call; for a corpus in pieces, or another corpus, pass `idf_weights`. A token in all
      references has weight 0, with a single reference all tokens have; a note states the number of such texts
    - baseline: a baseline file of bert-score: `LAYER,P,R,F` and one row per layer
    - max_length: length that texts are truncated to, special tokens included; None is the network's context, if it has one. A
      note states the number of truncated texts
    - model: the name in the signature
    - batch_tokens: padded tokens per batch; bounds the memory

    Errors: a decoder, no such layer, `max_length` beyond the context, a bad baseline file (ValueError).
    Statistics of an example: references, P, R, F. With several references the maximum of each, as in bert-score.
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
    is_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        encoder, layer = first_blocks(self.network, self.layer)
        context = getattr(getattr(self.network, "config", None), "context", None)
        source = getattr(self.network, "source", None)
        found = {"encoder": encoder, "layer": layer}
        found["max_length"] = context if self.max_length is None else self.max_length
        found["model"] = (source.name if source else "unnamed") if self.model is None else self.model
        found["baseline_3"] = torch.zeros(3) if self.baseline is None else read_baseline(self.baseline, layer)
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens} must be at least 1")
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
        check_has_reference(references)
        idf = self.idf
        if idf is True:
            idf = idf_weights(references, self.tokenizer, max_length=self.max_length)
        best_B3, found = torch.full((len(hypotheses), 3), -math.inf, dtype=torch.float64), Counter()
        for pairs in self._chunks(hypotheses, references):
            example_P3 = torch.tensor(pairs.examples)[:, None].expand(-1, 3)
            best_B3.scatter_reduce_(0, example_P3, self._match(pairs, idf), "amax")
            for number in (*dict(zip(pairs.examples, pairs.hypotheses, strict=True)).values(), *pairs.references):
                found.update(pairs.counts[number])
            if self.progress:
                done = pairs.examples[-1] + 1
                print(f"\r{done:,} of {len(hypotheses):,}", end="\n" * (done == len(hypotheses)), file=sys.stderr, flush=True)
        reference_counts = [sum(text is not None for text in texts) for texts in zip(*references, strict=True)]
        note_or_warn("truncated", partial(describe_truncated, self.max_length), found, notes)
        note_or_warn("unknown", describe_unknown, found, notes)
        note_or_warn("idf", describe_weightless, found, notes)
        count_B1 = torch.tensor(reference_counts, dtype=torch.float64)[:, None]
        return torch.cat([count_B1, (best_B3 - self.baseline_3) / (1 - self.baseline_3)], 1)

    def scores(self, statistics_XK: Tensor) -> Tensor:
        return statistics_XK[..., 3].double()

    def examples(self, statistics_BK: Tensor) -> Tensor:
        return self.scores(statistics_BK)

    def score(self, statistics_BK: Tensor) -> Score:
        names = ("precision", "recall", "fmeasure")
        parts = {name: exact_mean(statistics_BK[:, 1 + place]) for place, name in enumerate(names)}
        return Score(self.name, corpus_value(self, statistics_BK), parts, self.signature(statistics_BK))

    def signature(self, statistics_BK: Tensor, **resampling: object) -> str:
        settings = {"nrefs": reference_count(statistics_BK)} | resampling | {"model": self.model, "layer": self.layer}
        settings["idf"] = {True: "references", False: "no"}[self.idf] if isinstance(self.idf, bool) else "given"
        settings |= {"baseline": "no" if self.baseline is None else Path(self.baseline).name, "special": "weight-0"}
        settings |= {"max": self.max_length or "no", "version": f"bert-score-{BERT_SCORE_VERSION}"}
        dtype = next((weight.dtype for weight in getattr(self.network, "parameters", list)()), torch.float32)
        settings |= {} if dtype == torch.float32 else {"dtype": str(dtype).removeprefix("torch.")}
        return signature_of(settings)

    def _chunks(self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> Iterator["Pairs"]:
        """Yield all pairs in order, in chunks of a bounded number of tokens; each distinct text once per chunk."""
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
                        all_ids = token_ids(text, self.tokenizer)
                        ids = truncate(all_ids, self.max_length)
                        counts = {"texts": 1, "truncated": len(ids) < len(all_ids), "tokens": len(ids) - specials}
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
    def _match(self, pairs: "Pairs", idf: bool | Mapping[int, float]) -> Tensor:
        """Compute P, R and F of each pair, (P, 3) float64; count the texts of zero weight."""
        device = next((each.device for each in getattr(self.network, "parameters", list)()), None)
        length_U = torch.tensor([len(ids) for ids in pairs.ids], device=device)
        start_U = length_U.cumsum(0) - length_U
        ids_N = torch.tensor([id for ids in pairs.ids for id in ids], device=device)
        weight_N = self._weights(ids_N, start_U, length_U, idf)
        weight_U = torch.zeros_like(start_U, dtype=weight_N.dtype)
        weight_U.index_add_(0, torch.repeat_interleave(length_U), weight_N)
        for counts, weight in zip(pairs.counts, weight_U.tolist(), strict=True):
            counts["weightless"] = weight == 0 and counts["tokens"] > 0
        unit_ND = self._embed(ids_N, start_U, length_U, list(pairs.texts))
        hypothesis_P, reference_P = (torch.tensor(side, device=device) for side in (pairs.hypotheses, pairs.references))
        matched_P3 = torch.zeros(len(hypothesis_P), 3, dtype=torch.float64, device=device)
        for some_B in padded_batches(torch.maximum(length_U[hypothesis_P], length_U[reference_P]), self.batch_tokens):
            # Padding repeats the last token: it changes no maximum and has that token's weight, 0.
            place_BT, _ = padded_indices(start_U, length_U, hypothesis_P[some_B])
            place_BS, _ = padded_indices(start_U, length_U, reference_P[some_B])
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
            distinct_K, index_N = ids_N.unique(return_inverse=True)
            specials = (self.tokenizer.bos_id, self.tokenizer.eos_id)
            try:
                weights = [0.0 if id in specials else float(idf[id]) for id in distinct_K.tolist()]
            except KeyError as error:
                raise ValueError(f"idf has no weight for id {error}") from None
            if not all(0 <= weight < math.inf for weight in weights):
                raise ValueError("idf: a weight is negative or not finite")
            weight_N = torch.tensor(weights, dtype=torch.float64, device=ids_N.device)[index_N]
        if self.tokenizer.bos_id != self.tokenizer.eos_id:
            weight_N[start_U] = 0
        weight_N[start_U + length_U - 1] = 0
        return weight_N

    def _embed(self, ids_N: Tensor, start_U: Tensor, length_U: Tensor, texts: Sequence[str]) -> Tensor:
        """Embed all tokens, (N, D), scaled to unit length. Errors: a non-finite vector (ValueError with the text)."""
        unit_ND = None
        for some_B in padded_batches(length_U, self.batch_tokens):
            place_BT, is_real_BT = padded_indices(start_U, length_U, some_B)
            ids_BT = ids_N[place_BT]
            mask_BT = None if bool(is_real_BT.all()) else is_real_BT.long()
            hidden_BTD = self.encoder(ids_BT, mask_BT, hidden_states=True).hidden_states[self.layer]
            hidden_MD = hidden_BTD[is_real_BT].to(torch.promote_types(hidden_BTD.dtype, torch.float32))
            size_M1 = torch.linalg.vector_norm(hidden_MD, dim=-1, keepdim=True)
            if not bool(size_M1.isfinite().all()):
                row = int(is_real_BT.nonzero()[int((~size_M1.isfinite()).flatten().nonzero()[0]), 0])
                raise ValueError(f"the network has no finite vectors for the text {texts[int(some_B[row])][:80]!r}")
            if unit_ND is None:
                unit_ND = hidden_MD.new_empty(len(ids_N), hidden_MD.size(1))
            unit_ND[place_BT[is_real_BT]] = hidden_MD / size_M1.clamp(min=torch.finfo(size_M1.dtype).tiny)
        return unit_ND


class Pairs(NamedTuple):
    """A chunk of pairs: the example and the two text numbers of each; the distinct texts, their ids and counts for notes."""

    examples: list[int]
    hypotheses: list[int]
    references: list[int]
    texts: dict[str, int]
    ids: list[list[int]]
    counts: list[dict[str, int]]


def describe_truncated(max_length: int | None, found: Counter) -> str | None:
    if not found["truncated"]:
        return None
    return f"{found['truncated']} of {found['texts']} texts are truncated to {max_length} tokens"


def describe_unknown(found: Counter) -> str | None:
    if found["unknown"] <= MIN_UNKNOWN * found["tokens"]:
        return None
    percent = 100 * found["unknown"] / found["tokens"]
    return f"{percent:.1f} % of the tokens are the unknown token, whatever the text is: use an encoder that covers its script"


def describe_weightless(found: Counter) -> str | None:
    if not found["weightless"]:
        return None
    return (
        f"idf: each token of {found['weightless']} of {found['texts']} texts has weight 0, as has a token in all references "
        "(of one reference: all), and their pairs score 0. Use weights of a larger corpus (idf_weights), or score without idf"
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
    """BERTScore of a corpus: the mean F over examples, with the mean `.precision`, `.recall` and `.fmeasure` as parts.

        P = Σ over hypothesis tokens of w · max cosine    R = Σ over reference tokens of w · max cosine    F = 2 P R / (P + R)

    Values are at most 1 (from -1 without a baseline). `references` is one text per hypothesis, or streams: `references[r][i]`
    is a reference of hypothesis i, or None. `network` is an encoder and `tokenizer` its tokenizer; settings are those of
    `BertScore`: layer, idf, baseline, max_length, model, batch_tokens, progress. `device` moves the network first. Errors:
    those of `BertScore`; streams of unequal length, an example without a reference, non-finite embeddings (ValueError).
    Source: Zhang et al. 2020, arXiv 1904.09675; values are bert-score's.
    """
    if not isinstance(references, str) and all(text is None or isinstance(text, str) for text in references):
        references = [references]
    if device is not None:
        network = network.to(device)
    metric = BertScore(network, tokenizer, **settings)
    return metric.score(metric.statistics(hypotheses, references))


def first_blocks(network: Callable, layer: int | None) -> tuple[Callable, int]:
    """Return the encoder of `network`, cut after `layer` blocks with shared weights, and the number of that layer."""
    body = getattr(network, "body", network)
    stack = getattr(body, "encoder", body)
    if getattr(stack, "causal", False):
        raise ValueError("the network is a decoder, whose tokens attend only to earlier ones: BERTScore needs an encoder")
    if getattr(network, "training", False):
        raise ValueError("the network is in training mode, in which dropout is random: network.eval() first")
    if not hasattr(stack, "blocks"):
        if layer is None or layer < 0:
            raise ValueError(f"layer={layer}: the network has no accessible blocks: pass the number of layers, from 0")
        return network, layer
    depth = len(stack.blocks)
    layer = depth if layer is None else layer
    if not 0 <= layer <= depth:
        raise ValueError(f"layer={layer}: the encoder has layers 0 to {depth}")
    short = copy.copy(stack)
    short._modules = dict(stack._modules)  # a shared dict of modules would truncate the original as well
    short.blocks, short.layers = stack.blocks[:layer], stack.layers[:layer]
    return short, layer


bertscore = bert_score  # the name that `eval.bertscore` has always offered
