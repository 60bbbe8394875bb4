"""Settings as tables of plain values, such as TOML holds, and back. Standard library only.

TOML is UTF-8, and a file's name need not be: Python holds its other bytes as lone surrogates. Such text is written as a URI,
`file:caf%E9.txt`, and so is text that begins as one.
"""

import tomllib
import types
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

from data.config import BUILT_IN
from lora.config import CONFIGS
from train.config import TrainConfig, TrainError

URI = "file:"


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
    if hint is Path and value == "":
        raise TrainError(f"{place} = '': an empty name; the folder that a command runs in is .")
    if hint in (Path, str) and isinstance(value, str):
        return hint(read_spelled(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TrainError(f"{place} = {value!r}: {getattr(hint, '__name__', hint)} is expected")


def read_settings(folder: Path) -> TrainConfig:
    """What stands in a run's config.toml."""
    path = folder / "config.toml"
    if not path.is_file():
        raise TrainError(f"--resume {folder}: not a run, there is no {path.absolute()}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} is not TOML: {error}") from None
    return from_plain(TrainConfig, table, str(path))
