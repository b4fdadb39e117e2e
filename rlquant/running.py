"""What the commands ``run``, ``validate`` and ``cp`` do, once their options are parsed.

A recipe is one Python file with a class ``Config`` (a :class:`~rlquant.config.Section`) and ``main(config, run)``,
where ``run`` is the :class:`~rlquant.runs.RunFolder`; its settings are YAML files whose key ``recipe`` names it.
A recipe that ``accelerate launch`` or ``torchrun`` may start several times at once says ``SEVERAL_PROCESSES = True``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlquant import catalog
from rlquant.errors import InputError, unknown_name
from rlquant.runs import RunFolder, file_hash, package_versions

__all__ = ["Recipe", "copy", "find_recipe", "run_recipe", "validate"]

_KEY = "recipe"


@dataclass(frozen=True)
class Recipe:
    """A script, and a file with its settings.

    Attributes:
        name: of the run folder.
        script: the Python file.
        settings: the YAML file; None where there is none.
    """

    name: str
    script: Path
    settings: Path | None

    def config(self, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
        """The recipe's module and its checked settings. Raises InputError that lists every mistake."""
        from rlquant.config import Section, checked, read_yaml, with_override

        module = catalog.module_of(self.script, "recipes")
        kind = getattr(module, "Config", None)
        if not (
            isinstance(kind, type) and issubclass(kind, Section) and callable(getattr(module, "main", None))
        ):
            raise InputError(
                f"{self.script} is no recipe: it needs a Config(rlquant.config.Section) and main(config, run)"
            )
        tree = {} if self.settings is None else read_yaml(self.settings)
        tree.pop(_KEY, None)
        for text in overrides:
            tree = with_override(kind, tree, text)
        return module, checked(kind, tree, str(self.settings or self.script))


def find_recipe(name: str, settings: str | None = None) -> Recipe:
    """A recipe by its name, the name of one of its YAML files, or a path to a ``.py`` or ``.yml`` file.

    Args:
        name: as above.
        settings: name or path of another YAML file.

    Raises:
        InputError: there is no such recipe or file, or the YAML file belongs to another recipe.
    """
    configs = catalog.recipe_configs()
    path = Path(name).expanduser()
    if path.suffix in (".yml", ".yaml") or (name in configs and name not in catalog.recipes()):
        if settings is not None:
            raise InputError(f"{name} are settings already: leave out --config, or name the recipe")
        file = configs.get(name, path)
        return Recipe(file.stem, _script_of(file), file)
    if path.suffix == ".py":
        script = path
    elif name in catalog.recipes():
        script = catalog.recipe_file(name)
    else:
        raise unknown_name("recipe", name, dict.fromkeys([*catalog.recipes(), *configs]))
    if settings is None:
        beside = script.with_suffix(".yml")
        return Recipe(script.stem, script, beside if beside.exists() else None)
    file = configs.get(settings, Path(settings).expanduser())
    if file.exists() and _script_of(file).stem != script.stem:
        raise InputError(f"{file} are settings of {_script_of(file).stem}, not of {script.stem}")
    return Recipe(script.stem, script, file)


def run_recipe(name: str, settings: str | None, overrides: Sequence[str], out: Path | None) -> int:
    """Check the settings and run the recipe in its folder; its exit status, where it is alone: it ends here if not."""
    recipe = find_recipe(name, settings)
    module, config = recipe.config(overrides)
    determined = {
        "recipe": recipe.script.stem,
        "script": file_hash(recipe.script),
        "config": config.model_dump(mode="json"),
        "versions": package_versions(),
    }
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not getattr(module, "SEVERAL_PROCESSES", False):
        raise InputError(
            f"{recipe.script.stem} runs in one process, not in {processes}: start it without accelerate or torchrun"
        )
    folder = RunFolder(out or Path("runs") / recipe.name, determined, writes=rank == 0)
    try:
        status = int(module.main(config, folder) or 0)
    except SystemExit as ended:  # without a code: all processes but the first, which have nothing left to do
        if processes == 1 or ended.code:
            raise
        status = 0
    if processes > 1:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End one process of several without the interpreter's shutdown.

    It waits for the threads of every library, and one that never ended would hold up all the others.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def validate(path: Path) -> None:
    """Check the settings of a recipe (``.yml``) or a results document (``.json``) and say so.

    Raises:
        InputError: what is wrong with it.
    """
    if path.suffix in (".yml", ".yaml"):
        recipe = find_recipe(str(path))
        _, config = recipe.config()
        sys.stdout.write(
            f"{path}: settings of {recipe.script.stem}, {len(type(config).model_fields)} of them, all good\n"
        )
        return
    if path.suffix != ".json":
        raise InputError(f"{path} is neither a recipe's settings (.yml) nor a results document (.json)")
    from rlquant.measure import validate_results

    try:
        document = validate_results(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is no results document: {error}") from None
    sys.stdout.write(f"{path}: {document['schema']}, {len(document['rows'])} rows, all good\n")


def copy(name: str, folder: Path) -> list[Path]:
    """Copy a shipped recipe with its settings, an agent's folder or an environment's card into a folder.

    Raises:
        InputError: nothing of that name is shipped, or a file is there already.
    """
    sources = _shipped(name)
    taken = [folder / source.name for source in sources if (folder / source.name).exists()]
    if taken:
        raise InputError(f"{taken[0]} is there already: remove it, or copy to another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / source.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    return [folder / source.name for source in sources]


def _shipped(name: str) -> list[Path]:
    if name in catalog.recipes():
        configs = catalog.recipe_configs().values()
        return [catalog.recipe_file(name), *(path for path in configs if _script_of(path).stem == name)]
    if name in catalog.agents():
        return [catalog.agent_folder(name)]
    if name in catalog.envs():
        return [catalog.data_root() / "envs" / f"{name}.yml"]
    raise unknown_name("name", name, [*catalog.recipes(), *catalog.agents(), *catalog.envs()])


def _script_of(settings: Path) -> Path:
    """The script that a YAML file names: a shipped recipe, or a file beside it."""
    from rlquant.config import read_yaml

    named = read_yaml(settings).get(_KEY)
    if not isinstance(named, str):
        raise InputError(
            f"{settings} names no recipe: begin it with recipe: NAME, one of {', '.join(catalog.recipes())}"
        )
    beside = settings.parent / f"{named.removesuffix('.py')}.py"
    return beside if beside.exists() else catalog.recipe_file(named)
