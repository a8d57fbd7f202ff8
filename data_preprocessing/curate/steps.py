"""The table of steps, and what is typed for them.

    length:min=20,max=8000     a name, a colon, settings; a piece without `=` belongs to the list in front of it
    language:keep=en,zh
    exact

or the same in a recipe, a file of YAML or JSON:

    steps:
      - length: {min: 20, max: 8000}
      - language: {keep: [en, zh]}
      - exact
    split: {valid: 0.02}
"""

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from toolkits.foundation.errors import MachineError, UsageError, raise_all

from .choosers import Diverse, Exact, Near, Sample
from .judges import Language, Length, Quality
from .split import SETTINGS as SPLIT_SETTINGS
from .split import Split
from .step import Step

STEPS: Mapping[str, type[Step]] = {
    step.name: step for step in (Length, Language, Exact, Near, Quality, Diverse, Sample)
}


class _BadSettingError(Exception):
    """What is wrong with one setting."""


def read_steps(said: Sequence[str], split: str | None = None) -> tuple[list[Step], Split | None]:
    """Return the steps that `said` names and the split, None without one.

    Raises UsageError that lists everything that is wrong with them.
    """
    problems: list[str] = []
    words = [(text, *_words(text)) for text in said]
    steps = _steps(words, problems)
    found = _split(_words(f"split:{split}")[1], problems) if split is not None else None
    raise_all(UsageError, "the steps cannot be read (--list-steps explains them)", problems)
    return steps, found


def read_recipe(path: Path) -> tuple[list[Step], Split | None]:
    """Return the steps and the split of a recipe; UsageError that lists everything that is wrong with it."""
    content = _content(path)
    unknown = [str(key) for key in content if key not in ("steps", "split")] if isinstance(content, dict) else []
    if not isinstance(content, dict) or unknown or not isinstance(content.get("steps", []), list):
        found = f"found {', '.join(unknown)}" if unknown else "it has another form"
        raise UsageError(f"{path}: a recipe has a list `steps`, and may have `split`; {found}")
    problems: list[str] = []
    words = []
    for number, step in enumerate(content.get("steps", []), start=1):
        if isinstance(step, str):
            words.append((step, *_words(step)))
        elif isinstance(step, dict) and len(step) == 1 and isinstance(next(iter(step.values())) or {}, dict):
            ((name, settings),) = step.items()
            words.append((f"step {number}", str(name), dict(settings or {})))
        else:
            problems.append(f"step {number} is neither a name nor `name: {{settings}}`: {step!r}")
    steps = _steps(words, problems)
    said = content.get("split")
    split = _split(said if isinstance(said, dict) else _words(f"split:{said}")[1], problems) if said else None
    raise_all(UsageError, f"{path} cannot be read (--list-steps explains the steps)", problems)
    return steps, split


def explained() -> list[str]:
    """Return the table of steps, as --list-steps prints it."""
    lines = []
    for name, step in STEPS.items():
        lines += [f"{name}", f"    {_sentence(step)}"]
        lines += [f"    {line}" for line in _settings_of(step)]
        lines += [f"    drops: {code} ({said})" for code, said in step.reasons.items()]
    lines += ["", "--split valid=0.02", f"    {_sentence(Split)}"]
    lines += ["    NAME=SHARE ...  rows that go to OUT's sibling NAME; further settings are:"]
    lines += [f"    {line}" for line in _settings_of(Split, SPLIT_SETTINGS)]
    return lines


def spelled(step: Step) -> str:
    """Return a step as it could be typed, without what is left at its default."""
    said = []
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if value != field.default:
            said.append(f"{field.name}={','.join(value) if isinstance(value, tuple) else f'{value}'}")
    return step.name + (f":{','.join(said)}" if said else "")


def _words(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name in front of the colon, and the settings behind it as they are typed."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    last = ""
    for piece in rest.split(",") if rest else []:
        key, equals, value = piece.partition("=")
        if equals:
            last = key.strip()
            # Twice the same: both are kept, so that whoever reads them refuses the second.
            settings[last] = [value.strip()] if last not in settings else [*_listed(settings[last]), value.strip()]
        elif last:
            settings[last].append(piece.strip())
        else:
            settings[piece.strip()] = []
    return name.strip(), {key: value[0] if len(value) == 1 else value for key, value in settings.items()}


def _steps(said: Sequence[tuple[str, str, dict[str, Any]]], problems: list[str]) -> list[Step]:
    steps = []
    for where, name, settings in said:
        if name not in STEPS:
            problems.append(f"{where}: no step is called {name!r}; there are {', '.join(STEPS)}")
            continue
        found = _made(STEPS[name], where, settings, problems)
        if found is not None:
            steps.append(found)
    return steps


def _made(step: type[Step], where: str, settings: Mapping[str, Any], problems: list[str]) -> Any:
    """Return a step with settings, None with a line in `problems` for each thing that is wrong."""
    fields = {field.name: field for field in dataclasses.fields(step)}
    hints, found, before = get_type_hints(step), {}, len(problems)
    for key, value in settings.items():
        if key not in fields:
            problems.append(f"{where}: {step.name} has no setting {key!r}; it has {', '.join(fields)}")
            continue
        try:
            found[key] = _value(hints[key], value, fields[key].metadata["choices"])
        except _BadSettingError as error:
            problems.append(f"{where}: {key}={_shown(value)}: {error}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in settings]
    problems += [f"{where}: {step.name} needs {name}" for name in missing]
    if len(problems) > before:
        return None
    made = step(**found)
    problems += [f"{where}: {step.name} {problem}" for problem in made.problems()]
    return made if len(problems) == before else None


def _split(said: Mapping[str, Any], problems: list[str]) -> Split | None:
    shares = []
    for name, value in said.items():
        if name not in SPLIT_SETTINGS:
            try:
                shares.append((str(name), _value(float, value, ())))
            except _BadSettingError as error:
                problems.append(f"--split: {name}={_shown(value)}: {error}")
    settings = {name: value for name, value in said.items() if name in SPLIT_SETTINGS}
    found = _made(Split, "--split", settings, problems)
    if found is None:
        return None
    split = dataclasses.replace(found, shares=tuple(shares))
    problems += [f"--split: {problem}" for problem in split.share_problems()]
    return split


def _value(hint: Any, said: Any, choices: Sequence[str]) -> Any:
    """Return what was typed, or stood in a recipe, as a value of a setting's type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is tuple:
        return tuple(_one_of(str(one), choices) for one in _listed(said))
    if isinstance(said, list | dict) or said is None:
        raise _BadSettingError("it must be one value")
    if hint is str or get_origin(hint) is Literal:
        return _one_of(str(said), choices)
    return _number(hint, str(said))


def _number(hint: type, text: str) -> int | float:
    part = 100 if text.endswith("%") and hint is float else 1
    try:
        number = hint(text.removesuffix("%") if part > 1 else text.replace("_", "")) / part
    except ValueError:
        wanted = "a whole number" if hint is int else "a number, such as 0.8 or 2%"
        raise _BadSettingError(f"it must be {wanted}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise _BadSettingError("it must be a finite number")
    return int(number) if hint is int else number


def _one_of(text: str, choices: Sequence[str]) -> str:
    if choices and text not in choices:
        raise _BadSettingError(f"{text!r} is none of {', '.join(choices)}")
    return text


def _listed(said: Any) -> list[Any]:
    return list(said) if isinstance(said, list) else [said]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _content(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {path} cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from None
    try:
        import yaml
    except ImportError:
        raise MachineError(f"{path}: a recipe in YAML is read by PyYAML; pip install pyyaml, or write JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from None


def _sentence(step: type) -> str:
    return (step.__doc__ or "").strip().splitlines()[0]


def _settings_of(step: Any, names: Sequence[str] = ()) -> Iterator[str]:
    for field in dataclasses.fields(step):
        if names and field.name not in names:
            continue
        said, choices = field.metadata["said"], field.metadata["choices"]
        if choices and field.default != choices:
            said += f": {', '.join(choices)}"
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = ",".join(field.default) if isinstance(field.default, tuple) else f"{field.default}"
            default = f"default {default}" if field.default not in (None, ()) else ""
        yield f"{field.name}  {said}" + (f" ({default})" if default else "")
