"""Options of `python -m train`, read into a `TrainConfig`: their other names, the short help, recipes. Imports no torch."""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from data.shell import program
from lora.config import CONFIGS
from train.command_line import spelled
from train.config import RunConfig, TrainConfig
from train.config_toml import from_plain, objective_in, refuse_grant
from train.registry import config_type, name_of, summaries
from train.rewards.given import refuse_functions
from train.runs.errors import TrainError

RECIPES = Path(__file__).parent / "recipes"
HELP, HELP_ALL = "--help", "--help-all"
# Shown by --help, beside the options of the objective and the adapter that are named; --help-all shows all.
MAIN = (
    *("objective", "corpus", "init", "out", "resume", "recipe", "preset", "context", "adapter", "quantize"),
    *("steps", "epochs", "batch_size", "accumulate", "lr", "precision", "device", "mesh", "seed", "save_every"),
)


def read_options(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line, whose aliases are resolved (`resolve_aliases`).

    An option has its field's name (`--steps`); those of adapters, of --qat and of an objective also their group's (`--lora.r`).
    Errors (TrainError): a recipe or an objective that cannot be read.
    """
    recipe, objective = value_of("--recipe", arguments), value_of("--objective", arguments)
    default = read_recipe(recipe, objective) if recipe else config_type(objective or RunConfig.objective)()
    default = replace(default, run=replace(default.run, objective=objective or default.run.objective))
    groups = {name: kind for name, kind in get_type_hints(type(default)).items() if name != "recorded"}
    values = {name: getattr(default, name) for name in groups}
    is_short = HELP in arguments or "-h" in arguments
    own = (name_of(default.run.objective), value_of("--adapter", arguments))
    prefixed = (*CONFIGS, "qat", own[0])
    if is_short:
        values = {name: value if name in own else main_options(value) for name, value in values.items()}
        groups = {name: type(value) for name, value in values.items() if value is not None}
    groups = {name: kind if name in prefixed else Annotated[kind, tyro.conf.OmitArgPrefixes] for name, kind in groups.items()}
    options = make_dataclass("Options", [(name, kind, values[name]) for name, kind in groups.items()], frozen=True)
    options.__doc__ = help_text(is_short) if is_short or HELP_ALL in arguments else TrainConfig.__doc__
    words = [HELP if argument == HELP_ALL else argument for argument in arguments]
    # Without comments: tyro would look for the source of `Options`, which has none, once a group.
    read = tyro.cli(options, args=words, prog=program("train"), config=(tyro.conf.HelptextFromCommentsOff,))
    return type(default)(**{name: getattr(read, name) for name in groups})


def help_text(is_short: bool) -> str:
    """The text above the options of --help: what the command does, and the objectives."""
    fewer = f"Shown are the options that most runs need; {HELP_ALL} shows all.\n\n" if is_short else ""
    objectives = "\n".join(f"{name}: {text}" for name, text in summaries().items())
    return f"{TrainConfig.__doc__}\n\n{fewer}Objectives (their own options: --objective NAME --help):\n{objectives}"


def main_options(settings: Any) -> Any:
    """The settings for the short help, with all options but `MAIN` hidden; None where none is left."""
    kind = type(settings)
    hints, hidden = get_type_hints(kind), [each for each in fields(kind) if each.name not in MAIN]
    if len(hidden) == len(fields(kind)):
        return None
    hidden = [(each.name, Annotated[hints[each.name], tyro.conf.Suppress], getattr(settings, each.name)) for each in hidden]
    shown = make_dataclass(kind.__name__, hidden, bases=(kind,), frozen=True)
    shown.__doc__ = kind.__doc__
    return shown(**vars(settings))


def resolve_aliases(arguments: Sequence[str]) -> list[str]:
    """The command line with each option under its own name. Errors (TrainError): one option under two names; a name much like
    an alias, which the parser could not suggest.

    >>> resolve_aliases(["--learning-rate", "1e-3", "--max_grad_norm=1"])
    ['--lr', '1e-3', '--clip=1']
    """
    names = {alias: spelled(each.name) for kind in option_groups() for each in fields(kind) for alias in aliases(each)}
    options = {*names, *(spelled(each.name) for kind in option_groups() for each in fields(kind))}
    resolved, spoken = [], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        written = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
        option = names.get(written, written)
        if option.startswith("--") and spoken.setdefault(option, written) != written:
            raise TrainError(f"{written} is another name of {spoken[option]}: give one of them")
        if written not in options and (near := difflib.get_close_matches(written, names, 1, 0.85)):
            raise TrainError(f"there is no option {written}: {near[0]} is meant?")
        resolved.append(f"{option}{equals}{value}" if written in names else argument)
    return resolved


def option_groups() -> list[type]:
    return [kind for name, kind in get_type_hints(TrainConfig).items() if name not in (*CONFIGS, "qat", "recorded")]


def aliases(option) -> tuple[str, ...]:
    """The other names of a field's option, known from other trainers (`train.config.also`)."""
    return option.metadata.get("aliases", ())


def read_recipe(name: str, objective: str | None = None) -> TrainConfig:
    """Settings from a TOML file, or from `train/recipes/NAME.toml`; a setting that it omits keeps its default."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise TrainError(f"--recipe {name}: there is no {path}; recipes: {known}; or give a .toml file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} is not TOML: {error}") from None
    refuse_grant(table, str(path))
    config = from_plain(config_type(objective or objective_in(table)), table, str(path))
    refuse_functions(config.rewards.reward, str(path))
    return config


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of `--option VALUE` or `--option=VALUE`, read before the other options."""
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None
