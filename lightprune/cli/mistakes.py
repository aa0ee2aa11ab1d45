"""A user's mistake in one sentence: what jsonargparse says of it is a tree of types, pages long."""

import pydoc
import re
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightprune
from lightprune.cli.early import suggestion
from lightprune.errors import ConfigError, ExportError

_KEY = re.compile(r'\s*Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_CLASS = re.compile(r"^(?P<indent> *)(?:- )?Problem with given class_path '(?P<path>[^']*)':\n", re.MULTILINE)
_IN_CALLABLE = re.compile(r"Option '(?P<option>[^']+)' is not accepted.*?class_path='(?P<path>[^']+)'", re.DOTALL)
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']*)', val='?(?P<value>.*?)'?\)")
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$", re.MULTILINE)
_GIVEN = re.compile(r"^ *Given value: (?P<value>.*)", re.MULTILINE | re.DOTALL)
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
_BASES = ("lightning.Callback", "lightning.LightningModule", "lightning.LightningDataModule")
_CLASS_PATH = "class_path must have its module, as in lightprune.StructuredCut"
_MOST = 20  # settings that are listed
_LONGEST = 80  # characters of a value that is shown


def user_mistake(error: BaseException | None) -> str | None:
    """What the user got wrong, if `error` is about that: jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, ConfigError | ExportError | ArgumentError | MisconfigurationException):
            return str(error)
        error = error.__cause__
    return None


def explain(message: str, verb: str, settings: Sequence[str], callbacks: Sequence[str] = ()) -> str:
    """What the parser's message means, in one sentence.

    Args:
        message: of the parser's error.
        verb: the command that was to run.
        settings: the keys that it knows, dotted.
        callbacks: the class paths of the config's callbacks, as far as they are known.
    """
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown_option(found[1], verb, settings)
    if found := re.match(r"(?:Subcommand|Group) '(\S+)' does not accept option '(\S+)'", message):
        prefix = "" if found[1] == verb else f"{found[1].removeprefix(f'{verb}.')}."
        return _unknown_setting(prefix + found[2], verb, settings)
    if found := re.match(r"the following arguments are required: (.*)", message):
        keys = [key.removeprefix(f"{verb}.") for key in found[1].split(", ")]
        options = " and ".join(f"--{key}" for key in keys)
        what = "it" if len(keys) == 1 else "them"
        return f"{verb} needs {' and '.join(keys)}: set {what} in a config file (--config), or by {options}."
    nested = _NESTED.search(message)
    if nested is not None and message.startswith('Parser key "trainer.callbacks"'):
        return _which_callback(nested["key"], nested["value"], callbacks)
    return _explain_value(message, "")


def arguments_of(class_path: str) -> list[str]:
    """The arguments that a class can be given in a config; none if it cannot be found."""
    try:
        cls = pydoc.locate(class_path)
        return list(ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False))
    except Exception:  # this is about another error: what goes wrong here says nothing to the user
        return []


def _unknown_option(option: str, verb: str, settings: Sequence[str]) -> str:
    if not option.startswith("-"):
        return f"{option!r} belongs to no option of {verb}: an option looks like --trainer.max_steps 100."
    name = option.partition("=")[0]
    if re.match(r"--(trainer\.)?callbacks?\.|--[A-Z]", name):
        leaf = name.rpartition(".")[2]
        return (
            f"{name} is not an option of {verb}: write --callback.NAME.{leaf} VALUE, NAME being the callback's class."
        )
    near = suggestion(name, [f"--{setting}" for setting in settings])
    return f"{name} is not an option of {verb}{near}: see lightprune {verb} --help."


def _unknown_setting(key: str, verb: str, settings: Sequence[str]) -> str:
    names = key.split(".")
    depth = next(d for d in range(len(names)) if not _below(settings, names[: d + 1]) or d == len(names) - 1)
    group, name, known = ".".join(names[:depth]), names[depth], _below(settings, names[:depth])
    near = suggestion(name, known)
    owner = group or f"The config of {verb}"
    what = f"it may have {', '.join(known)}" if len(known) <= _MOST else f"lightprune {verb} --help lists those it has"
    return f"{owner} has no setting {name!r}{near}: {what}."


def _below(settings: Sequence[str], path: Sequence[str]) -> list[str]:
    """The names that follow a path in the settings; an empty one where the path is a setting itself."""
    prefix = "".join(f"{name}." for name in path)
    below = [f"{setting}.".removeprefix(prefix) for setting in settings if f"{setting}.".startswith(prefix)]
    return list(dict.fromkeys(name.partition(".")[0] for name in below if name != "config."))


def _which_callback(key: str, value: str, callbacks: Sequence[str]) -> str:
    """A path into the list of callbacks means the last one for jsonargparse, and mostly another one for the user."""
    leaf = key.rpartition(".")[2]
    names = [path.rpartition(".")[2] for path in callbacks if leaf in arguments_of(path)]
    how = f"write --callback.{names[0] if names else 'NAME'}.{leaf} {value}"
    told = "" if names else ", NAME being the callback's class"
    return f"--trainer.callbacks.{key} does not say which of the callbacks it is for: {how}{told}."


def _explain_value(message: str, owner: str) -> str:
    """Walk down to what is wrong: the keys and classes on the way say where."""
    if found := _KEY.match(message):
        return _explain_value(found["rest"], f"{owner}.{found['key']}" if owner else found["key"])
    # The base class is tried where the config names none, and in vain where another one is wrong.
    problems = sorted(_CLASS.finditer(message), key=lambda problem: problem["path"] in _BASES)
    for problem in problems[:1]:
        body = _block(message[problem.end() :], len(problem["indent"]))
        return _explain_class(body, problem["path"], owner)
    if found := _IN_CALLABLE.search(message):
        return _no_argument(found["path"], found["option"], owner)
    if found := re.search(r"Expected a dot import path string: (.*)", message):
        return f"{owner}: there is no class {found[1]!r}{suggestion(found[1], lightprune.__all__)}: {_CLASS_PATH}."
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", message):
        return f"{owner}: {found[1]} is not a {found[2]}: name one in class_path."
    if missing := _missing_class(message, owner):
        return missing
    expected = [match for match in _EXPECTED.finditer(message) if match["type"].strip()]
    given = _GIVEN.search(message) or next((match for match in expected if match["value"] is not None), None)
    if expected and given is not None:
        kinds = dict.fromkeys(_kind(match["type"]) for match in expected)
        return f"{owner} is {_short(given['value'])}: it must be {_either(list(kinds))}."
    first = re.split(r"\n *(?:Subtypes|Given value)", message)[0]
    return " ".join(f"{owner}: {first}".split()) if owner else " ".join(first.split())


def _explain_class(body: str, path: str, owner: str) -> str:
    """What is wrong with a class that a config names, or with the arguments that it gives it."""
    if _KEY.match(body):
        return _explain_value(body, path.rpartition(".")[2])
    if found := re.match(r"\s*Option '([^']+)' is not accepted", body):
        if path in _BASES:
            return f"{owner} names no class for {found[1]!r}: give class_path, and the arguments in init_args."
        return _no_argument(path, found[1], owner)
    if found := re.match(r"\s*the following arguments are required: (.*)", body):
        needed = found[1].strip()
        return f"{owner}: {path} needs {needed}: set {'them' if ', ' in needed else 'it'} in init_args."
    return _missing_class(body, owner) or " ".join(f"{owner}: {path}: {body}".split())


def _missing_class(message: str, owner: str) -> str | None:
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        near = suggestion(found[2], dir(pydoc.locate(found[1])))
        return f"{owner}: {found[1]} has no class {found[2]!r}{near}: correct class_path."
    if found := re.search(r"No module named '([^']+)'", message):
        return f"{owner}: there is no module {found[1]!r}, which class_path names: correct it, or set PYTHONPATH."
    return None


def _no_argument(path: str, option: str, owner: str) -> str:
    known = arguments_of(path)
    takes = f"it takes {', '.join(known)}" if known else "see its documentation"
    return f"{owner}: {path} has no argument {option!r}{suggestion(option, known)}: {takes}."


def _block(text: str, indent: int) -> str:
    """The lines that are indented by more."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and len(line) - len(line.lstrip()) <= indent), None)
    return "\n".join(lines[:end])


def _kind(typehint: str) -> str:
    if values := re.match(r"(?:typing\.)?Literal\[(.*)\]", typehint):
        return values[1].replace("'", "")
    name = re.sub(r"<class '([^']+)'>", r"\1", typehint)
    base = name.partition("[")[0].rpartition(".")[2]
    return _TYPES.get(base) or _TYPES.get(base.lower()) or name


def _either(kinds: list[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _short(value: str) -> str:
    text = " ".join(value.split())
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
