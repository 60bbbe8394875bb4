"""Read and write `config.json` by its family's table; a field that the table does not know is kept unchanged."""

import json
import shlex
from pathlib import Path

from model.config import ModelConfig, load_family
from model.folders import HubError, refuse_lfs_pointer
from model.heads import CLASSIFIERS
from model.safetensors_file import WeightFileError
from model.ties import resolve_tied_embeddings
from model.weights import head_spec, other_pool

NAMES_OF_LABELS = ("id2label", "label2id", "problem_type")
# Older spellings of written fields, and fields about weights that have changed.
BIDIRECTIONAL_PROMPT, POOL = "bidirectional_prompt", "pool"
REPLACED = ("torch_dtype", "num_labels", "head", BIDIRECTIONAL_PROMPT, POOL, "quantization_config", "transformers_version")


def base_of_adapter(folder: Path) -> str:
    """Return the base folder that an adapter's settings name; "BASE" if it is not there."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    return named if isinstance(named, str) and Path(named).is_dir() else "BASE"


def read_config(folder: str | Path, *, any_head: bool = False) -> ModelConfig:
    """Read `config.json` into a ModelConfig: the family by `model_type`, the head by `architectures`. `any_head`: an unknown
    head becomes "unknown" instead of an error, for a caller who wants the body. Errors: HubError."""
    path = Path(folder) / "config.json"
    if (Path(folder) / "adapter_config.json").is_file() and not path.is_file():
        base, name = base_of_adapter(Path(folder)), shlex.quote(str(folder))
        raise HubError(
            f"{folder} holds an adapter, not a network: `python -m lora merge {shlex.quote(base)} {name} --out DIR` makes "
            "one of it and its base"
        )
    if not path.is_file():
        if not path.parent.is_dir():
            raise HubError(f"{folder} does not exist")
        checkpoint = next((f"; a run's are {each}" for each in sorted(path.parent.glob("checkpoints/step-*"))[-1:]), "")
        raise HubError(f"{folder} is not a model folder: it holds no config.json{checkpoint}")
    try:
        published = json.loads(refuse_lfs_pointer(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HubError(f"{path} is not JSON: {error}") from None
    if not isinstance(published, dict):
        raise HubError(f"{path} is not a JSON object")
    if "model_type" not in published:
        raise HubError(f"{path} names no model_type")
    if other := published.get("transformers_weights"):
        raise HubError(f"{path}: transformers_weights={other!r} names another file of weights, which is not read")
    try:
        rules = load_family(published["model_type"])
        values = rules.read_config(published) | {"head": _read_head(published, rules.HEADS, any_head), "extra": published}
        values[BIDIRECTIONAL_PROMPT] = published.get(BIDIRECTIONAL_PROMPT, False)
        values[POOL] = published.get(POOL) if values["head"] == "sequence" else None
        if values["head"] in CLASSIFIERS:
            values["labels"] = int(published.get("num_labels") or len(published.get("id2label") or ()) or 2)
        config = ModelConfig(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{path}: {error if isinstance(error, ValueError) else repr(error)}") from None
    try:
        return resolve_tied_embeddings(config, Path(folder))
    except WeightFileError as error:
        raise HubError(str(error)) from None


def _read_head(published: dict, heads: dict, any_head: bool) -> str:
    """Return the head: by our own field `head`, else by the architecture, else the family's first."""
    if "head" in published:
        return published["head"]
    names = published.get("architectures") or [next(iter(heads.values())).architecture]
    if not isinstance(names, list):
        raise ValueError(f"architectures={names!r} is not a list")
    for head, spec in heads.items():
        if spec.architecture == names[0]:
            return head
    if any_head:
        return "unknown"
    known = ", ".join(dict.fromkeys(spec.architecture for spec in heads.values() if spec.architecture))
    raise ValueError(f"the architecture {names[0]!r} is not supported; supported: {known}")


def write_config(config: ModelConfig, dtype: str, **settings: object) -> str:
    """Return `config.json` as the family publishes it, with the class that opens it in transformers where there is one.

    Unknown fields of the file that was read are written back, label names too while their number is unchanged. The field
    `head` is ours, for a head of our own or a body without one; so are `bidirectional_prompt`, unknown to transformers, which
    reads such a network causally, and `pool`, of a classifier whose pooling is not its family's: transformers has no class for
    it. `settings`: further entries.
    """
    rules, architecture = load_family(config.family), head_spec(config).architecture
    written = {"model_type": rules.MODEL_TYPE, "dtype": dtype, "architectures": [architecture] if architecture else []}
    if config.head == "none" or architecture is None:
        written["head"] = config.head
    written |= rules.write_config(config) | ({BIDIRECTIONAL_PROMPT: True} if config.bidirectional_prompt else {})
    written |= {POOL: pool} if (pool := other_pool(config)) else {}
    extra = {key: value for key, value in config.extra.items() if key not in REPLACED or key in written}  # the same order again
    if config.head in CLASSIFIERS and len(extra.get("id2label") or ()) != config.labels:
        for name in NAMES_OF_LABELS:
            extra.pop(name, None)
        names = [f"LABEL_{label}" for label in range(config.labels)]
        written["id2label"] = {str(label): name for label, name in enumerate(names)}
        written["label2id"] = {name: label for label, name in enumerate(names)}
        written |= {"problem_type": "regression"} if config.labels == 1 else {}
    return json.dumps(extra | written | settings, indent=2, ensure_ascii=False) + "\n"
