"""RoFormer: BERT with rotary positions in place of learned ones, and without next sentence.

Source: Su et al. 2021, arXiv 2104.09864, the paper that brought them. Its published weights pair neighbours, 2i and 2i + 1,
of each head: their q and k are put in the order of halves when they are read ("interleaved"), see `model.rope`.
"""

from model.config import HeadSpec, Rope
from model.families import bert
from model.families._shared import refuse_unless
from model.families.bert import affine

MODEL_TYPE = "roformer"
_FAMILY = bert.FAMILY | {"family": MODEL_TYPE, "position": "rope", "rope": Rope()}

_TINY = _FAMILY | bert.published(128, 3, 4) | {"vocab_size": 2048, "context": 128, "norm_eps": 1e-5, "pad_id": 0}
PRESETS = {
    # The default of --objective mlm: trains in about two minutes on two CPU cores.
    "tiny-encoder": _TINY | {"token_types": 1},
    "tiny-encoder-pairs": _TINY | {"token_types": 2},  # of --mlm.nsp
    "roformer-base": _FAMILY | bert.published(768, 12, 12) | bert.SEGMENTS | {"vocab_size": 50000, "context": 1536},
}


def read_config(hf: dict) -> dict:
    refuse_unless(hf, rotary_value=False)
    if hf.get("embedding_size") not in (None, hf.get("hidden_size", 768)):
        raise ValueError(f"embedding_size={hf['embedding_size']} != hidden_size={hf.get('hidden_size', 768)} is not supported")
    default = {"vocab_size": 50000, "max_position_embeddings": 1536}
    return bert.read_common(default | hf, _FAMILY, bos=None, eos=None, pad=0)


def write_config(config) -> dict:
    if config.rope != Rope():
        raise ValueError(f"a roformer config.json cannot hold rope={config.rope}: it is {Rope()}")
    return bert.write_config(config) | {"embedding_size": config.width, "rotary_value": False}


def weights(config) -> tuple[tuple, ...]:
    turned = ("attention.project.query", "attention.project.key")
    return tuple(
        (*row, "interleaved") if any(name in row[0] for name in turned) else row
        for row in bert.WEIGHTS
        if row[2] != "position"
    )


_WORDS = bert.HEADS["mlm"].weights
HEADS = {
    "mlm": HeadSpec("RoFormerForMaskedLM", _WORDS),
    # transformers has no class for it: under BERT's names, so that RoFormerForMaskedLM finds its own part.
    "pretraining": HeadSpec(None, bert.HEADS["pretraining"].weights, dense=True),
    "sequence": HeadSpec(
        "RoFormerForSequenceClassification",
        affine("head.dense", "classifier.dense", "matrix") + affine("head.out", "classifier.out_proj", "head"),
        dense=True,
        own_activation=True,
    ),
    "token": HeadSpec("RoFormerForTokenClassification", affine("head.out", "classifier", "head")),
    "qa": HeadSpec("RoFormerForQuestionAnswering", affine("head.out", "qa_outputs", "head")),
    "none": HeadSpec("RoFormerModel"),
}
ALIASES, RENAMED, DROPOUTS = bert.ALIASES, bert.RENAMED, bert.DROPOUTS
PREFIX = "roformer."
IGNORED = ("{body}encoder.embed_positions.weight",)  # sines and cosines
CONSTANTS = {"{body}encoder.embed_positions.weight": "sines_then_cosines"}  # written, as transformers expects it
