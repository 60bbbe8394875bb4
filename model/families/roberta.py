"""RoBERTa: BERT without next sentence; positions begin at row pad_id + 1 = 2 of their table, and there is one segment.

Source: Liu et al. 2019, arXiv 1907.11692; names as in fairseq's weights that transformers reads.
"""

from model.config import HeadSpec
from model.families import bert
from model.families.bert import affine

MODEL_TYPE = "roberta"
_FAMILY = bert.FAMILY | {"family": MODEL_TYPE}
_IDS = {"vocab_size": 50265, "norm_eps": 1e-5, "token_types": 1, "position_offset": 2, "bos_id": 0, "eos_id": 2, "pad_id": 1}

PRESETS = {
    "roberta-base": _FAMILY | bert.published(768, 12, 12) | _IDS,
    "roberta-large": _FAMILY | bert.published(1024, 24, 16) | _IDS,
}


def read_config(hf: dict) -> dict:
    values = bert.read_common({"vocab_size": 50265} | hf, _FAMILY, bos=0, eos=2, pad=1)
    offset = (values["pad_id"] or 0) + 1
    if values["context"] <= offset:
        raise ValueError(f"max_position_embeddings={values['context']} leaves no position after pad_token_id={offset - 1}")
    return values | {"position_offset": offset, "context": values["context"] - offset}


def write_config(config) -> dict:
    if config.pad_id is None or config.position_offset != config.pad_id + 1:
        raise ValueError(f"roberta's position_offset={config.position_offset} is pad_id={config.pad_id} plus one")
    return bert.write_config(config) | {"max_position_embeddings": config.context + config.position_offset}


weights, RENAMED, IGNORED, DROPOUTS = bert.weights, bert.RENAMED, bert.IGNORED, bert.DROPOUTS
PREFIX = "roberta."
_WORDS = (
    *affine("head.dense", "lm_head.dense", "matrix"),
    *affine("head.norm", "lm_head.layer_norm", "norm"),
    ("head.weight", "lm_head.decoder.weight", "head"),
    ("head.bias", "lm_head.bias", "bias"),
)
_DENSE = affine("head.dense", "classifier.dense", "matrix")
HEADS = {
    "mlm": HeadSpec("RobertaForMaskedLM", _WORDS),
    "sequence": HeadSpec(
        "RobertaForSequenceClassification", _DENSE + affine("head.out", "classifier.out_proj", "head"), dense=True
    ),
    "token": HeadSpec("RobertaForTokenClassification", affine("head.out", "classifier", "head")),
    "qa": HeadSpec("RobertaForQuestionAnswering", affine("head.out", "qa_outputs", "head")),
    "pooler": HeadSpec("RobertaModel", affine("head.dense", "{body}pooler.dense", "matrix"), dense=True),
    "none": HeadSpec("RobertaModel"),
}
ALIASES = {
    "lm_head.decoder.weight": "{body}embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
CONSTANTS: dict[str, str] = {}
