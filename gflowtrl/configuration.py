"""Reading of recipes and options: YAML, command lines, names and types, with helpful errors."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from gflowtrl.checks import MOST_OF_A_WORD, check_choice, short_repr, shortened
from gflowtrl.files import read_text, reading


MOST_NAMES = 30  # that an error lists
MOST_VALUES = 100_000  # of a YAML file, an alias counted as all that it stands for
#: Fields that decide which other fields a section has.
KINDS = ("type", "model_type", "model_name_or_path")


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and `no` as a word (`eval_strategy: no`), unlike YAML 1.1.

    Duplicate keys are errors, and so are aliases that contain themselves or multiply to millions of values, since
    checks and fingerprints visit each value.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):  # PyYAML's own ones name no line
            reason = f"{short_repr(node.value)} is not a valid {node.tag.rpartition(':')[2]}; text needs quotes"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for place, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map x` is refused below
            key = self.construct_object(place, deep=True)
            if not isinstance(key, Hashable):  # refused below
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", place.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values in a node. `counts` holds those of nodes by their id; 0 while a node is being counted."""
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
        return known
    counts[id(node)] = 0
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else [entry])]
    counts[id(node)] = total = 1 + sum(_count_values(part, counts) for part in parts)
    if total > MOST_VALUES:
        text = f"with its aliases it has more than {MOST_VALUES:,} values"
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
    return total


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag != "tag:yaml.org,2002:bool"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Errors name the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}. Give a YAML file with --config.")
    with reading(path, "YAML"):
        text = read_text(path, "YAML")
        try:
            content = yaml.load(text, RecipeLoader) or {}
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ValueError(
                f"line {line} has the character {chr(error.character)!r}, which YAML does not allow"
            ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold fields with values (field: value), not {type(content).__name__}.")
    return content


def recipe_folder() -> Path:
    """The folder of the recipes that come with the library: package data, in the repository a link to recipes/."""
    package = Path(__file__).parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"  # a checkout without symbolic links


def known_files(folder: Path) -> dict[str, Path]:
    """YAML files of a folder, by name."""
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_file(name: str | Path, folder: Path, what: str = "recipe", base_of: Path | None = None) -> Path:
    """Find a recipe or a configuration of accelerate: a file, or one of that name in `folder`.

    Args:
        name: the file or the name.
        folder: `recipe_folder()`, or the folder of accelerate configurations in it.
        what: its name in the error.
        base_of: the recipe whose `base` it is; the file is then relative to that recipe.

    Raises:
        FileNotFoundError: neither exists; the message lists the known names.
    """
    known = known_files(folder)
    file = Path(name) if base_of is None else base_of.parent / str(name)
    if file.is_file():
        return file
    if str(name) in known:
        return known[str(name)]
    who = "" if base_of is None else f", which {base_of} names as its base"
    where = "" if base_of is None else f", relative to the folder of {base_of}"
    raise FileNotFoundError(f"There is no {what} {name}{who}; give a YAML file{where}, or one of {', '.join(known)}.")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `changes`: sections field by field, everything else (lists too) as a whole.

    A section with another kind than the base's (another teacher, another model) replaces it as a whole, since its
    fields differ. An empty section empties that of the base.
    """
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        same = both and all(value[kind] == base[name].get(kind) for kind in KINDS if kind in value)
        result[name] = merged(base[name], value) if same and value else value
    return result


def parse_value(text: str) -> Any:
    """Read a value of the command line as YAML, or as text if it is not valid YAML."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise ValueError(f"The value {short_repr(text)} is nested too deeply. Give another one.") from None


def parse_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--a.b value`, `--a.b=value`, `--flag` (true) and `--list 1 2 3` into a flat `{"a.b": value}`."""
    options: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if Path(word).suffix in (".yaml", ".yml") or word in known_files(recipe_folder()):
                raise ValueError(f"A recipe is given by --config: write --config {word}.")
            raise ValueError(
                f"{short_repr(word)} is not an option; give, for example, --data_dir DIR or --gflownet.learning_rate "
                f"1e-3."
            )
        name, equals, text = word[2:].partition("=")
        if name == "recipe":
            recipe = text or " ".join(words[:1]) or "FILE"
            raise ValueError(f"There is no option --recipe. A recipe is given by --config: write --config {recipe}.")
        values = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        parsed = [parse_value(value) for value in values]
        options[name.replace("-", "_")] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return options


def set_option(tree: Any, path: str, value: Any, above: str = "") -> None:
    """Set `a.b.0.c` in nested dictionaries and lists, in place. Dictionaries that are missing or null are made.

    Another type (`teacher.type`) replaces the whole section except its weight, since the fields of the two differ.

    Raises:
        ValueError: the path goes through a plain value, or to a position that a list does not have.
    """
    key, dot, rest = path.partition(".")
    if not isinstance(tree, dict | list):
        raise ValueError(
            f"--{above}{path} cannot be set: {above[:-1]} is the value {short_repr(tree)} and has no fields."
        )
    if isinstance(tree, list) and not (key.isdecimal() and int(key) < len(tree)):
        raise ValueError(f"--{above}{key} cannot be set: it is a list with positions 0 to {len(tree) - 1}.")
    index = int(key) if isinstance(tree, list) else key
    if dot:
        if isinstance(tree, dict) and tree.get(key) is None:
            tree[key] = {}
        inner = tree[index]
        set_option(inner, rest, value, f"{above}{key}.")
        return
    if above and key == "type" and tree.get(key) != value:
        for name in tree.keys() - {"weight"}:
            del tree[name]
    tree[index] = value


def read_recipe(
    path: str | Path, arguments: Sequence[str], known: Collection[str], gflownet: Collection[str]
) -> dict[str, Any]:
    """The content of a recipe file with its bases and the options of a command line.

    Args:
        path: the YAML file. Its field `base` may name another one, relative to its folder, or one that comes with the
            library; the file then holds the differences.
        arguments: see `gflowtrl.pipeline.load_recipe`.
        known: fields of a recipe.
        gflownet: fields of its section `gflownet`, whose options need no section.

    Raises:
        ValueError: an unknown field; the message offers the closest known one.
    """
    path = Path(path)
    content = {"name": path.stem, **_on_its_base(path)}
    check_names(content, known)
    options = parse_options(arguments)
    for name in _types_first(options):
        section, dot, _ = name.partition(".")
        if section not in known and section not in gflownet:
            check_names([section], known if dot else {*known, *gflownet})
        set_option(content, name if section in known else f"gflownet.{name}", options[name])
    return content


def _types_first(names: Collection[str]) -> list[str]:
    """Names of options in their order, but the type of a section before its fields."""
    ordered: dict[str, None] = {}
    for name in names:
        kind = f"{name.rpartition('.')[0]}.type"
        ordered |= dict.fromkeys([kind, name] if kind in names else [name])
    return [*ordered]


def _on_its_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe with that of its base, and of its base's base."""
    if path.resolve() in above:
        raise ValueError(f"{path} is among its own bases: {' <- '.join(str(file) for file in above)}.")
    content = read_yaml(path)
    if "base" not in content:
        return content
    base = find_file(content.pop("base"), recipe_folder(), base_of=path)
    return merged(_on_its_base(base, (*above, path.resolve())), content)


def check_names(given: Iterable[str], known: Iterable[str], where: str = "", what: str = "field") -> None:
    """Raise an error for an unknown name; the message offers the closest known one. `what` is named, in `where`."""
    known = sorted(known)
    for name in given:
        if name not in known:
            prefix = f"{where}." if where else ""
            wrong = shortened(str(name), MOST_OF_A_WORD)
            raise ValueError(f"There is no {what} {prefix + wrong!r}. {_remedy(wrong, known, prefix)}")


def _remedy(wrong: str, known: Sequence[str], prefix: str) -> str:
    """Offer the closest known name, or else all of a few names, or those of many that resemble the wrong one most."""
    if close := difflib.get_close_matches(wrong, known, n=1):
        return f"Did you mean {prefix + close[0]!r}?"
    if len(known) <= MOST_NAMES:
        return f"Choose from {', '.join(known)}."
    inside = [name for name in known if wrong and (wrong in name or name in wrong)]
    close = [*dict.fromkeys([*inside, *difflib.get_close_matches(wrong, known, n=8, cutoff=0.4)])][:8]
    if close:
        return f"The closest of {len(known)} names: {', '.join(close)}."
    return f"There are {len(known)} names, among them {', '.join(known[:8])}."


@contextmanager
def locate_errors(where: str, names: Container[str]) -> Iterator[None]:
    """Context manager: errors say where in the recipe a value is.

    Args:
        where: a section. "learning_rate is -1" becomes "sft.learning_rate is -1" where `names` holds that name.
        names: the section's fields. Before other messages comes "sft: ".
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        dot = "." if str(error).partition(" ")[0] in names else ": "
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}{dot}{error}") from error


def field_names(kind: type) -> list[str]:
    """Names of the fields that a dataclass's constructor takes."""
    return [entry.name for entry in fields(kind) if entry.init]


def check_types(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Check values against the annotations of the dataclass `kind`.

    As on TRL's command line, a single value for a list becomes a list of one. A mapping for a section becomes the
    section's dataclass.
    """
    check_names(values, field_names(kind), where)
    hints = typing.get_type_hints(kind)
    return {name: _fit(hints[name], value, f"{where}.{name}" if where else name) for name, value in values.items()}


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "fields with values"}


def _fit(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and not isinstance(value, hint):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} must be fields with values, but it is {short_repr(value)}.")
        return hint(**check_types(hint, value, where))
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if is_union else (hint,)
    plain = [typing.get_origin(choice) or choice for choice in choices]
    if value is None and type(None) in plain:
        return None
    if list in plain:
        listed = value if isinstance(value, list) or str in plain else [value]
        inner = typing.get_args(choices[plain.index(list)])
        return [_fit(inner[0], v, where) for v in listed] if inner and isinstance(listed, list) else listed
    for kind in plain:
        if isinstance(kind, type) and issubclass(kind, Enum):
            check_choice(where, value, [word.value for word in kind])
    checkable = [kind for kind in plain if kind in _NAMES]
    if len(checkable) < len([kind for kind in plain if kind is not type(None)]):
        return value  # the annotation allows other types too: the class itself checks
    if type(value) not in checkable and not (float in checkable and type(value) is int):
        kinds = " or ".join(_NAMES[kind] for kind in checkable)
        raise TypeError(f"{where} must be {kinds}, but it is {short_repr(value)}.")
    return value
