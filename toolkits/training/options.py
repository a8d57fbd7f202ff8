"""The declared settings as options of a click command."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import click

from ..foundation.errors import UsageError
from .config import Setting, TrainConfig, all_settings


def parse_flags(flags: Sequence[str]) -> TrainConfig:
    """Read flags as `TrainConfig.flags` writes them; raise UsageError when one does not exist or fit."""
    try:
        return TrainConfig.from_values(_flags.make_context("temper train", list(flags)).params)
    except click.exceptions.Exit as asked_for_help:
        raise SystemExit(asked_for_help.exit_code) from None
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None


def settings_options(command: Callable[..., Any], *, leave_out: Collection[str] = ()) -> Callable[..., Any]:
    """Add an option for every setting but those of the groups `leave_out`; the command gets them by field name."""
    for setting in reversed(list(all_settings())):
        if setting.group not in leave_out:
            command = setting_option(setting)(command)
    return command


def setting_option(setting: Setting) -> Callable[..., Any]:
    """Return the click option of one setting."""
    flag = setting.flag
    if setting.type is bool:
        flag = f"{flag}/{flag.replace('--', '--no-', 1)}"
    keywords: dict[str, Any] = {"required": True} if setting.required else {"default": setting.default}
    return click.option(
        flag,
        setting.name,
        type=_click_type(setting),
        help=setting.help,
        show_default=not setting.required and setting.default is not None,
        **keywords,
    )


def _click_type(setting: Setting) -> Any:
    if setting.choices:
        return click.Choice(setting.choices)
    # Of `kind | None` the kind: None is what is not said.
    kind = next((each for each in get_args(setting.type) if each is not NoneType), setting.type)
    return click.Path(path_type=Path) if kind is Path else kind


@click.command()
@settings_options
def _flags(**_values: Any) -> None:
    """Only its parser is used."""
