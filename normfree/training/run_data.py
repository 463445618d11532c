"""The data of an existing run: found from any working directory, and divided as in training."""

from __future__ import annotations

from pathlib import Path

from normfree.data.source import Split
from normfree.data.sources.open import NAMES, SCHEMES, open_source
from normfree.data.spec import parse_spec
from normfree.data.subset import in_folds
from normfree.files import UnreadableFileError, read_text
from normfree.suggest import problem
from normfree.training.config import Config
from normfree.training.config_io import load_config
from normfree.training.config_values import VAL_FRACTION, fold_in

ENVIRONMENT = "environment.txt"
_ENVIRONMENT_BYTES = 1_000_000
# Lines of environment.txt: the working directory of the run, and the paths of its data so far.
FOLDER, DATA_AT = "folder", "data_at"
_PATHS = ("folder", "csv", "packed")  # schemes whose target is a path


def located(config: Config, run: Path, *, fix: str = "") -> Config:
    """Return the config of a run with a path of its data that is valid in this working directory.

    Relative paths are those of the folder in which the run was started. If the data are gone, they are looked for where
    they were before they were moved.

    Args:
        config: config of the run.
        run: folder of the run.
        fix: what the error message advises; "" to resume the run with --data.

    Raises:
        ValueError: the data are neither there nor here.
    """
    data = config.data
    scheme, colon, _ = data.partition(":")
    if Path(data).drive:  # C:\photos
        scheme = colon = ""
    if scheme in NAMES or (colon and scheme not in _PATHS):
        return config
    target = parse_spec(data, allowed=SCHEMES["csv"])[0] if colon else data
    if Path(target).expanduser().exists():
        return config
    for folder in recorded(run, FOLDER):
        if (Path(folder) / target).exists():
            return config.model_copy(update={"data": data.replace(target, str(Path(folder) / target), 1)})
    for earlier in recorded(run, DATA_AT):
        if Path(earlier).exists():
            return config.model_copy(update={"data": data.replace(target, earlier, 1)})
    raise ValueError(
        problem(
            f"the data of {run}, {target!r}, are not there",
            allowed="the same images in any folder",
            fix=fix or f"normfree train {run} --data FOLDER",
        )
    )


def open_run_data(run: Path, *, fix: str = "") -> Split:
    """Return the split of the data of a run, as it was in training. `fix` is that of `located`.

    Raises:
        ValueError: the run has no config, or its data cannot be read.
    """
    config = located(load_config(run / "config.toml"), run, fix=fix)
    return open_config_data(config)


def open_config_data(config: Config, *, pipes: bool = False) -> Split:
    """Return the split of the data that a config names, without an audit."""
    fraction = config.input.val_fraction
    fold = fold_in(fraction)
    split = open_source(
        config.data,
        # Folds divide the images that are not in the test part, which is that of a run with the default fraction.
        val_fraction=VAL_FRACTION if isinstance(fraction, str) else fraction,
        test_fraction=config.input.test_fraction,
        seed=config.seed,
        pipes=pipes,
        labels=not config.objective.startswith("simclr"),
    )
    return split if fold is None else in_folds(split, fold=fold[0], count=fold[1], seed=config.seed)


def run_of(model: str) -> Path | None:
    """Return the run folder that `model` is, or whose model folder it is; None for others."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "config.toml").is_file() and (
            folder.resolve() == Path(model).resolve() or Path(model).name == "model"
        ):
            return folder
    return None


def recorded(run: Path, key: str) -> list[str]:
    """Return the values of a key in the environment.txt of a run."""
    try:
        lines = read_text(run / ENVIRONMENT, limit=_ENVIRONMENT_BYTES).splitlines()
    except UnreadableFileError:
        return []
    return [line.removeprefix(f"{key} ") for line in lines if line.startswith(f"{key} ")]


def path_of(data: str) -> str:
    """Return the absolute path that a value of `data` names, or "" if it names none that exists."""
    target = data.partition(":")[2].partition(",")[0] if data.partition(":")[0] in _PATHS else data
    path = Path(target).expanduser()
    return str(path.absolute()) if target and path.exists() else ""
