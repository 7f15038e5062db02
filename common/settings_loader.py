"""Settings from flags and environment variables: the only reader of either.

The settings class is the whole description: `kv_capacity_tokens` is `--kv-capacity-tokens` and
`PECSCHED_KV_CAPACITY_TOKENS`, its default, bounds and help text are the field's. Flag over variable
over default. A variable that sets another command's field is left to that command (one environment
may serve all of them); one that no command knows is refused, because it is a typo.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta

from common.errors import StartupError
from common.messages.base import Record
from common.settings import EVERY_SETTINGS, NOT_WITH, ONLY_WITH, POSITIONAL

S = TypeVar("S", bound=Record)

PREFIX = "PECSCHED_"
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
OWN_GROUP = "settings"


class SettingsError(StartupError):
    """A flag or variable is unknown, missing or has a value outside its bounds. One line, for the person."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings class, as a person sees it."""

    name: str
    type: Any
    default: Any
    description: str
    positional: bool
    group: str
    """Title under which `--help` lists it."""
    only_with: Mapping[str, tuple[Any, ...]]
    """Other settings by name, and the values they must have for this one to mean anything."""
    not_with: tuple[str, ...] = ()
    """Other settings by name, beside which this one may not be set."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def base(self) -> Any:
        """The type without its bounds."""
        return self.type.__origin__ if hasattr(self.type, "__metadata__") else self.type

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.base) if get_origin(self.base) is Literal else ()

    @property
    def metas(self) -> tuple[Meta, ...]:
        return tuple(meta for meta in getattr(self.type, "__metadata__", ()) if isinstance(meta, Meta))


def settings_of(cls: type[Record]) -> tuple[Setting, ...]:
    """The fields of a settings class, in the order of their definition."""
    settings = []
    for field in msgspec.structs.fields(cls):
        metas = [meta for meta in getattr(field.type, "__metadata__", ()) if isinstance(meta, Meta)]
        settings.append(
            Setting(
                name=field.name,
                type=field.type,
                default=field.default,
                description=next((meta.description for meta in reversed(metas) if meta.description), ""),
                positional=any((meta.extra or {}).get(POSITIONAL, False) for meta in metas),
                group=_group_title(cls, field.name),
                only_with={k: v for meta in metas for k, v in (meta.extra or {}).get(ONLY_WITH, {}).items()},
                not_with=tuple(name for meta in metas for name in (meta.extra or {}).get(NOT_WITH, ())),
            )
        )
    return tuple(settings)


def load(cls: type[S], argv: Sequence[str], env: Mapping[str, str], *, prog: str = "pecsched") -> S:
    """Settings from a command's arguments (without its name) and the environment.

    `--help` prints the settings and leaves with SystemExit(0). Raises: SettingsError.
    """
    settings = settings_of(cls)
    refuse_unknown_variables(env)
    given = _parse(cls, settings, argv, prog)
    values: dict[str, Any] = {}
    for setting in settings:
        if setting.name in given:
            source = setting.name if setting.positional else setting.flag
            values[setting.name] = convert(setting, given[setting.name], source)
        elif not setting.positional and setting.variable in env:
            values[setting.name] = convert(setting, env[setting.variable], setting.variable)
        elif setting.default is NODEFAULT:
            raise SettingsError(f"{setting.flag} (or {setting.variable}) is needed: {setting.description}")
    loaded = cls(**values)
    for setting in settings:
        _refuse_in_vain(setting, loaded, given)
        _refuse_both(setting, {each.name: each for each in settings}, loaded, given)
    return loaded


def _refuse_in_vain(setting: Setting, loaded: Record, given: Mapping[str, Any]) -> None:
    """Nothing is silently ignored: a flag, or a variable with another value than the default, that has no effect
    beside the others. (One environment may serve several commands, so a default in it asks for nothing.)"""
    value = getattr(loaded, setting.name)
    if not _is_set(setting, loaded, given):
        return
    for name, allowed in setting.only_with.items():
        other = getattr(loaded, name)
        if other not in allowed:
            source = _spelled(setting, value) if setting.name in given else setting.variable
            here, needed = _spelled_of(name, other), _spelled_of(name, allowed[0])
            raise SettingsError(f"{source}: has no effect with {here}; it needs {needed}")


def _refuse_both(setting: Setting, others: Mapping[str, Setting], loaded: Record, given: Mapping[str, Any]) -> None:
    """Two settings that say the same thing: whichever were followed, the other would be ignored."""
    if not _is_set(setting, loaded, given):
        return
    for other in (others[name] for name in setting.not_with):
        if _is_set(other, loaded, given):
            source, beside = (each.flag if each.name in given else each.variable for each in (setting, other))
            raise SettingsError(f"{source}: says the same thing as {beside}; give one of them")


def _is_set(setting: Setting, loaded: Record, given: Mapping[str, Any]) -> bool:
    return setting.name in given or getattr(loaded, setting.name) != setting.default


def environment(settings: Record, cls: type[Record], **instead: object) -> dict[str, str]:
    """The variables that give another command, of settings class `cls`, the same values wherever both
    have the field; `instead` replaces or adds some by field name."""
    own = {setting.name for setting in settings_of(type(settings))}
    values = {s.name: getattr(settings, s.name) for s in settings_of(cls) if s.name in own} | instead
    return {PREFIX + name.upper(): _text(value) for name, value in values.items()}


def refuse_unknown_variables(env: Mapping[str, str]) -> None:
    """Raises: SettingsError, naming a PECSCHED_ variable that no command knows, and the likeliest one meant."""
    known = {s.variable for cls in EVERY_SETTINGS for s in settings_of(cls) if not s.positional}
    for name in sorted(env):
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"{name}: no such setting{_suggestion(name, known)}")


def convert(setting: Setting, value: Any, source: str) -> Any:
    """The value as the field's type. Raises: SettingsError, naming `source` (a flag or variable)."""
    if setting.base is bool and isinstance(value, str):
        value = BOOLEANS.get(value.strip().lower(), value)
    try:
        return msgspec.convert(value, setting.type, strict=False)
    except msgspec.ValidationError:
        raise SettingsError(f"{source}: must be {expected(setting)}, not {value!r}") from None


def expected(setting: Setting) -> str:
    """What a value may be, in words: "a whole number of 0 to 65535"."""
    if setting.choices:
        return "one of " + ", ".join(setting.choices)
    noun = {int: "a whole number", float: "a number", bool: "true or false"}.get(setting.base, "text")
    bounds = {name: _bound(setting, name) for name in ("ge", "gt", "le", "lt")}
    low = f"of {bounds['ge']}" if bounds["ge"] is not None else f"over {bounds['gt']}"
    high = f"to {bounds['le']}" if bounds["le"] is not None else f"below {bounds['lt']}"
    return " ".join([noun, *(part for part in (low, high) if not part.endswith("None"))])


class _Parser(argparse.ArgumentParser):
    """Reports a mistake by raising, instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)")


def _parse(cls: type[Record], settings: Sequence[Setting], argv: Sequence[str], prog: str) -> dict[str, Any]:
    arguments = " ".join(setting.name.upper() for setting in settings if setting.positional)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flags] {arguments}".rstrip(),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=_help_width()),
        description=" ".join((cls.__doc__ or "").split()),
        epilog="The flag wins over the environment variable, the variable over the default.",
        allow_abbrev=False,
    )
    titles = sorted({setting.group for setting in settings}, key=lambda title: title != OWN_GROUP)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for setting in settings:
        group = groups[setting.group]
        if setting.positional:
            group.add_argument(setting.name, metavar=setting.name.upper(), help=setting.description)
        elif setting.base is bool:
            group.add_argument(
                setting.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=_help(setting)
            )
        else:
            group.add_argument(setting.flag, default=argparse.SUPPRESS, metavar=_metavar(setting), help=_help(setting))
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flag = unknown[0].split("=", 1)[0]
        hint = _suggestion(flag, [s.flag for s in settings if not s.positional])
        raise SettingsError(
            f"{flag}: no such {'flag' if flag.startswith('-') else 'argument'}{hint} (see {prog} --help)"
        )
    return vars(given)


def _spelled(setting: Setting, value: Any) -> str:
    """The flag as it was given."""
    return f"--no-{setting.flag[2:]}" if value is False else setting.flag


def _spelled_of(name: str, value: Any) -> str:
    """Another setting with its value, as a flag."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _help(setting: Setting) -> str:
    default = "" if setting.default in (NODEFAULT, "") else f"default {_text(setting.default)}; "
    needed = [_spelled_of(name, allowed[0]) for name, allowed in setting.only_with.items()]
    only = f"; only with {' and '.join(needed)}" if needed else ""
    return f"{setting.description} [{default}{setting.variable}{only}]".replace("%", "%%")


def _help_width() -> int:
    return max(60, min(110, shutil.get_terminal_size().columns - 2))


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {int: "N", float: "X"}.get(setting.base, "TEXT")


def _group_title(cls: type[Record], name: str) -> str:
    """Fields are listed under the class that defines them first: the reader sees what all roles share."""
    owner = next(base for base in reversed(cls.__mro__) if name in getattr(base, "__annotations__", {}))
    return OWN_GROUP if owner is cls else owner.__name__.removesuffix("Settings").lower() + " settings"


def _bound(setting: Setting, name: str) -> Any:
    return next((value for meta in setting.metas if (value := getattr(meta, name)) is not None), None)


def _suggestion(name: str, known: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
