"""A training run as one YAML file, checked in full before anything is loaded.

``${NAME}`` in any text is an environment variable; relative paths start at the current directory.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from inplace_ttt.errors import in_one_line
from inplace_ttt.shipped import PACKAGE
from inplace_ttt.train.recipe_checks import check
from inplace_ttt.train.schema import RecipeError, build, expand_variables, load_yaml
from inplace_ttt.train.specs import Recipe


def find_recipe(name: str | Path) -> Path:
    """A file, or one of the shipped recipes: NAME, NAME.yaml or recipes/NAME.yaml. Raises RecipeError."""
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    if path.is_file() or str(path) not in (stem, f"{stem}.yaml", str(Path("recipes", f"{stem}.yaml"))):
        return path
    folders = (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes")
    shipped = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(f"{name}: no such file, nor a recipe of that name, only {', '.join(sorted(shipped))}")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, data: bool = True) -> Recipe:
    """Reads and checks a recipe. ``overrides`` are ``key.sub=value`` with a YAML value. Raises RecipeError.

    ``data``: whether its data must be there (a plan needs none).
    """
    try:
        values = load_yaml(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({in_one_line(error, None)})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings (key: value)")
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, data=data)


def make_recipe(values: Mapping[str, Any], *, data: bool = True) -> Recipe:
    """A checked recipe from plain values. Raises RecipeError. ``data``: as ``load_recipe`` has it."""
    recipe = build(Recipe, expand_variables(dict(values), optional=None if data else "data"))
    object.__setattr__(recipe, "raw", dict(values))  # as written: results then name no machine's paths
    check(recipe, data)
    return recipe


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets ``key.sub=value`` in place."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"{override!r}: write key=value or key.sub=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML ({in_one_line(error, None)})") from None
    *folders, last = key.split(".")
    for folder in folders:
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        values = values[folder]
    values[last] = value
