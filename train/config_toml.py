"""Settings as TOML tables, and back. Standard library only.

TOML is UTF-8, and a file's name need not be: Python holds its other bytes as lone surrogates. Such text is written as a URI,
`file:caf%E9.txt`, and so is text that begins as one.
"""

import tomllib
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

from data.config import BUILT_IN, BUILT_IN_RECORDS, CorpusEntry, parse_entry
from lora.config import CONFIGS
from train.config import RunConfig, TrainConfig
from train.registry import config_type, file_hash, is_file, name_of
from train.rewards.names import with_absolute_paths as with_absolute_rewards
from train.runs.errors import TrainError

URI = "file:"
GRANT = "allow_code_rewards"  # of a command line alone


def to_plain(config: TrainConfig) -> dict:
    """The settings as TOML tables. TOML has no null, so fields that are None are omitted; so are adapters that are not used and
    the permission to run replies' code."""
    unused = CONFIGS.keys() - {config.run.adapter}
    plain = {k: _plain(v) for k, v in asdict(config).items() if v is not None and k not in unused and _plain(v) != {}}
    plain.get("rewards", {}).pop(GRANT, None)
    return plain


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The settings with absolute paths, so that a run can be resumed from any folder."""

    def absolute(path: str | Path) -> Path:
        return Path(path).expanduser().absolute()

    def found(entry: CorpusEntry) -> str:
        return str(entry if entry.path in (*BUILT_IN, *BUILT_IN_RECORDS) else entry._replace(path=str(absolute(entry.path))))

    corpus = tuple(map(found, config.data.parsed))
    init = None if config.run.init is None else absolute(config.run.init)
    anchor = replace(config.anchor, anchor_corpus=tuple(found(parse_entry(each)) for each in config.anchor.anchor_corpus))
    validation = tuple(found(CorpusEntry(path)) for path in config.data.validation)
    data = replace(config.data, corpus=corpus, validation=validation, cache=absolute(config.data.cache))
    scored = [(name, path) for name, paths in config.report.eval_corpora.items() for path in paths]
    report = replace(config.report, eval_corpus=tuple(f"{name}={found(CorpusEntry(path))}" for name, path in scored))
    objective = str(absolute(config.run.objective)) if is_file(config.run.objective) else config.run.objective
    rewards = replace(config.rewards, reward=with_absolute_rewards(config.rewards.reward))
    changed = {"data": data, "report": report, "anchor": anchor, "rewards": rewards}
    return replace(config, **changed, run=replace(config.run, init=init, objective=objective))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return spelled(str(value)) if isinstance(value, Path | str) else value


def spelled(text: str) -> str:
    """
    >>> spelled("caf\\udce9 50%"), read_spelled("file:caf%E9%2050%25") == "caf\\udce9 50%", spelled("50%")
    ('file:caf%E9%2050%25', True, '50%')
    """
    raw = text.encode(errors="surrogateescape")
    is_utf8 = raw.decode(errors="replace") == text
    return text if is_utf8 and not text.startswith(URI) else URI + quote(raw)


def read_spelled(text: str) -> str:
    return unquote_to_bytes(text.removeprefix(URI)).decode(errors="surrogateescape") if text.startswith(URI) else text


def from_plain(kind: type, table: dict, where: str) -> Any:
    """Read a table into a dataclass. Errors (TrainError, naming file and key): an unknown key, a value of the wrong type."""
    if not isinstance(table, dict):
        raise TrainError(f"{where} = {table!r}: a table is expected")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(table) - known):
        raise TrainError(f"{where}: unknown setting {unknown[0]!r}; known here: {', '.join(sorted(known))}")
    values = {}
    for name, value in table.items():
        hint = hints[name]
        place = f"{where}: {name}"
        values[name] = _from_section(kind, name, value, place) if is_dataclass(hint) else _typed(hint, value, place)
    return kind(**values)


def _from_section(kind: type, name: str, table: dict, where: str) -> Any:
    """Read a table into a field of `kind`; a key that it omits has the field's own default, an objective's batch size say."""
    hint, (section,) = typing.get_type_hints(kind)[name], [f for f in fields(kind) if f.name == name]
    read = from_plain(hint, table, where)
    if section.default_factory in (MISSING, hint):
        return read
    return replace(section.default_factory(), **{key: getattr(read, key) for key in table})


def _typed(hint: Any, value: Any, place: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise TrainError(f"{place} = {value!r}: one of {', '.join(map(repr, args))}")
    if origin in (types.UnionType, typing.Union):
        return _typed(next(arg for arg in args if arg is not types.NoneType), value, place)
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise TrainError(f"{place} = {value!r}: {len(inner)} values are expected")
        return tuple(_typed(h, v, place) for h, v in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {str(key): _typed(args[1], each, f"{place}.{key}") for key, each in value.items()}
    if hint is Path and value == "":
        raise TrainError(f"{place} = '': an empty name; the folder that a command runs in is .")
    if hint in (Path, str) and isinstance(value, str):
        return hint(read_spelled(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TrainError(f"{place} = {value!r}: {getattr(hint, '__name__', hint)} is expected")


def objective_in(table: dict) -> str:
    """The objective that a table of settings names."""
    run = table.get("run")
    return str(run.get("objective", RunConfig.objective)) if isinstance(run, dict) else RunConfig.objective


def read_settings(folder: Path, *, to_train: bool = False, objective: str | None = None) -> TrainConfig:
    """Read a run's config.toml. A user's own task file is run if `to_train`; otherwise its settings are omitted.

    objective: the present path of that file. Errors (TrainError): no run, no TOML, or another task file than the run's.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise TrainError(f"--resume {folder}: not a run, there is no {path.absolute()}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} is not TOML: {error}") from None
    refuse_grant(table, str(path))
    stored = objective_in(table)
    if is_file(stored) and not to_train:
        return from_plain(TrainConfig, {k: v for k, v in table.items() if k != name_of(stored)}, str(path))
    if objective is not None or is_file(stored):
        table["run"] = table["run"] | {"objective": same_file(objective or stored, table, path)}
    return from_plain(config_type(objective_in(table)), table, str(path))


def refuse_grant(table: dict, where: str) -> None:
    """Refuse a file that permits replies' code to be run (TrainError): only a command line does."""
    if isinstance(rewards := table.get("rewards"), dict) and GRANT in rewards:
        raise TrainError(f"{where}: {GRANT} is no setting of a file: remove it, and give the command --allow-code-rewards")


def same_file(objective: str, table: dict, path: Path) -> str:
    """The path of the task's file. Errors (TrainError): it is not the file that the run began with, by SHA-256."""
    stored, began = objective_in(table), table.get("recorded", {}).get("objective_sha256")
    if not is_file(stored) or not is_file(objective):
        raise TrainError(f"--objective {objective}: the run in {path.parent} trains {stored}")
    if file_hash(objective) != began:
        raise TrainError(
            f"--objective {objective} is not the file that {path.parent} began with (SHA-256 {began}): "
            "a resume would learn something else. Name that file, or begin a new run with --init"
        )
    return objective
