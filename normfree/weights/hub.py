"""The Hugging Face hub: repositories with published weights for our variants, downloads and uploads.

Nothing is downloaded unless the caller asks for it: by `hf-hub:OWNER/NAME`, or by `weights="download"`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType

from normfree.suggest import did_you_mean, needs, problem, unknown
from normfree.weights.checksums import SUMS_FILE

PREFIX = "hf-hub:"

# Weights published by timm (timm 1.0.31, `default_cfgs`): tag by architecture.
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


def repository_of(name: str, *, tag: str = "") -> str:
    """Return the hub repository with published weights for a variant.

    `nfnet_f0` and `timm_dm_nfnet_f0` both have DeepMind's weights, as converted by timm.

    Args:
        name: name of the variant.
        tag: timm's tag of the weights; "" means the only one.

    Raises:
        ValueError: no weights, or none with this tag, are published for this variant.
    """
    timm_name = name.removeprefix("timm_") if name.startswith("timm_") else f"dm_{name}"
    if timm_name not in TAGS:
        known = [f"timm_{n}" for n in TAGS] + [n.removeprefix("dm_") for n in TAGS if n.startswith("dm_")]
        raise ValueError(
            problem(
                f"no published weights are known for {name!r}.{did_you_mean(name, known)}",
                allowed=", ".join(sorted(known)),
                fix=f"for weights from another repository pass weights='{PREFIX}OWNER/NAME'",
            )
        )
    if tag not in ("", TAGS[timm_name]):
        raise ValueError(unknown(f"tag of {name}", tag, [TAGS[timm_name]]))
    return f"timm/{timm_name}.{TAGS[timm_name]}"


def fetch(address: str) -> Path:
    """Download `config.json` and `model.safetensors` into the cache of the hub library and return their folder.

    Args:
        address: `hf-hub:OWNER/NAME[@REVISION]`; without an owner, as in `hf-hub:dm_nfnet_f0.dm_in1k`, timm's.

    Raises:
        ValueError: the address is invalid, the repository cannot be reached, or it lacks one of the files.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    repository, _, revision = address.removeprefix(PREFIX).partition("@")
    if not address.startswith(PREFIX) or not repository or repository.count("/") > 1:
        raise ValueError(
            problem(
                f"{address!r} is not the address of a repository",
                allowed=f"{PREFIX}OWNER/NAME",
                fix=f"for example {PREFIX}timm/dm_nfnet_f0.dm_in1k",
            )
        )
    if "/" not in repository:
        repository = f"timm/{repository}"
    hub = _hub()
    try:
        files = [
            hub.hf_hub_download(repository, name, revision=revision or None)
            for name in ("config.json", "model.safetensors")
        ]
    except Exception as error:  # each transport raises its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{address} could not be downloaded: {reason}") from None
    with contextlib.suppress(Exception):  # few repositories have it
        hub.hf_hub_download(repository, SUMS_FILE, revision=revision or None)
    return Path(files[0]).parent


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Create `OWNER/NAME` on the hub if needed, upload the three files of a model folder, and return the address.

    Raises:
        ValueError: the hub refused; the message has its reason.
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    hub = _hub()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=["config.json", "model.safetensors", "README.md", SUMS_FILE],
            commit_message="Upload with normfree",
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{repository} could not be uploaded: {reason}") from None
    return str(address)


def _hub() -> ModuleType:
    with needs("the Hugging Face hub", install="normfree[hub]"):
        import huggingface_hub
    return huggingface_hub
