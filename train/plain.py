"""Settings as tables of plain values, such as TOML holds, and back. Standard library only."""

import types
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.config import BUILT_IN
from lora.config import CONFIGS
from train.config import TrainConfig, TrainError


def to_plain(config: TrainConfig) -> dict:
    """Tables of plain values for TOML, which has no null: a field that is None is left out, and so are adapters not asked
    for."""
    unused = CONFIGS.keys() - {config.run.adapter}
    return {k: _plain(v) for k, v in asdict(config).items() if v is not None and k not in unused}


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The settings as a run's config.toml has them: they hold from whatever folder it is resumed."""

    def absolute(path: str | Path) -> Path:
        return Path(path).expanduser().absolute()

    corpus = tuple(entry if entry in BUILT_IN else str(absolute(entry)) for entry in config.data.corpus)
    init = None if config.run.init is None else absolute(config.run.init)
    data = replace(config.data, corpus=corpus, cache=absolute(config.data.cache))
    return replace(config, data=data, run=replace(config.run, init=init))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type, table: dict, where: str) -> Any:
    """The reverse; an unknown key, or a value of the wrong type, is an error that names it and the file."""
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
        values[name] = from_plain(hint, value, place) if is_dataclass(hint) else _typed(hint, value, place)
    return kind(**values)


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
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TrainError(f"{place} = {value!r}: {getattr(hint, '__name__', hint)} is expected")
