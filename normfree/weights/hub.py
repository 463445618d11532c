"""The Hugging Face hub: which published weights belong to which row, and the one place that downloads.

Nothing is fetched unless the word says so: `hf-hub:OWNER/NAME`, or `weights="download"`.
"""

from __future__ import annotations

from pathlib import Path

from normfree.suggest import did_you_mean

PREFIX = "hf-hub:"

#: timm's published weights (timm 1.0.31, `default_cfgs`): its architecture -> the tag behind the dot.
TAGS: dict[str, str] = {
    **{f"dm_nfnet_f{level}": "dm_in1k" for level in range(7)},
    "nfnet_l0": "ra2_in1k",
    "eca_nfnet_l0": "ra2_in1k",
    "eca_nfnet_l1": "ra2_in1k",
    "eca_nfnet_l2": "ra3_in1k",
    "nf_regnet_b1": "ra2_in1k",
    "nf_resnet50": "ra2_in1k",
    "test_nfnet": "r160_in1k",
}


def repository_of(name: str) -> str:
    """The hub repository that holds published weights for a row: `nfnet_f0` and `timm_dm_nfnet_f0` both have
    DeepMind's, as converted by timm.

    Raises:
        ValueError: none are published for this row.
    """
    timm_name = name.removeprefix("timm_") if name.startswith("timm_") else f"dm_{name}"
    if timm_name not in TAGS:
        rows = [f"timm_{n}" for n in TAGS] + [n.removeprefix("dm_") for n in TAGS if n.startswith("dm_")]
        raise ValueError(
            f"no published weights are known for {name!r}.{did_you_mean(name, rows)} Rows that have them: "
            f"{', '.join(sorted(rows))}. Others: weights='{PREFIX}OWNER/NAME'."
        )
    return f"timm/{timm_name}.{TAGS[timm_name]}"


def fetch(word: str) -> Path:
    """Downloads `config.json` and `model.safetensors` of `hf-hub:OWNER/NAME[@REVISION]` into the hub's own cache
    and returns the folder. `hf-hub:dm_nfnet_f0.dm_in1k`, without an owner, means timm's.

    Raises:
        ValueError: the word is none, the repository cannot be reached, or it lacks one of the files.
        ModuleNotFoundError: huggingface_hub is missing.
    """
    repository, _, revision = word.removeprefix(PREFIX).partition("@")
    if not word.startswith(PREFIX) or not repository or repository.count("/") > 1:
        raise ValueError(
            f"{word!r}: expected {PREFIX}OWNER/NAME, for example {PREFIX}timm/dm_nfnet_f0.dm_in1k."
        )
    if "/" not in repository:
        repository = f"timm/{repository}"
    hub = _hub()
    try:
        files = [
            hub.hf_hub_download(repository, name, revision=revision or None)
            for name in ("config.json", "model.safetensors")
        ]
    except Exception as error:  # every transport has errors of its own; the word names what was asked for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{word} could not be downloaded: {reason}") from None
    return Path(files[0]).parent


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Creates `OWNER/NAME` on the hub if needed, uploads the three files of a model folder, returns the address.

    Raises:
        ValueError: the hub refused; the message says why.
        ModuleNotFoundError: huggingface_hub is missing.
    """
    hub = _hub()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=["config.json", "model.safetensors", "README.md"],
            commit_message="Upload with normfree",
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{repository} could not be uploaded: {reason}") from None
    return str(address)


def _hub():  # type: ignore[no-untyped-def]  # a module
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the Hugging Face hub needs huggingface_hub: pip install 'normfree[hub]'"
        ) from None
    return huggingface_hub
