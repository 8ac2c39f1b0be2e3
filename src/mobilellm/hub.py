"""From what a person types to a model directory: a path, a run, or a Hub id that is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mobilellm.hub_connection import hub_or_cache
from mobilellm.licence import CARD, stated_licence
from mobilellm.model_directory import CONFIG, LICENCE_FILES, model_in

DESCRIPTION = ("*.json", "tokenizer.model", CARD, *LICENCE_FILES)
"""What tells which model a repository holds, without its weights."""
_WANTED = (*DESCRIPTION, "*.safetensors", "pytorch_model*.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    source: str | Path,
    say: Callable[[str], None],
    revision: str | None = None,
    wanted: Sequence[str] = _WANTED,
) -> Path:
    """The local directory of a model; `say` gets one-line notices (the licence, a fallback to the cache).

    A directory of a training run stands for the `model` directory inside it, or `adapter` if it trained one
    (`model/adapter_files.py`). Of a Hub repository the files that fit `wanted` are fetched, by default all
    that `load` reads. Raises FileNotFoundError when there is neither such a directory nor, on the Hub or in
    its cache, such a repository.
    """
    if source == "":  # as of $UNSET: pathlib takes it for the folder one stands in
        raise FileNotFoundError("'' names no model; name a model directory, a training run or a Hub id")
    path = local_path(source)
    if path.is_dir():
        return model_in(path)
    if path.exists():
        raise FileNotFoundError(f"{source}: {_not_this_file(path)}")
    if not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"{source}: no such directory; name a model directory, or a Hub id such as "
            "facebook/MobileLLM-125M"
        )
    if path.parent.is_dir():
        there = sorted(item.name for item in path.parent.iterdir() if item.is_dir())
        some = ", ".join([*there[:8], *(["…"] if len(there) > 8 else [])])
        raise FileNotFoundError(
            f"{source}: no such directory; {path.parent} is here and holds {some or 'none'} (to "
            "download a Hub repository of that name, run this from another directory)"
        )
    return _download(str(source), say, revision, wanted)


def _not_this_file(path: Path) -> str:
    """What to name in place of a file."""
    if (path.parent / CONFIG).is_file():
        return f"is a file; name the directory that holds it, {path.parent}"
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            if path.suffix != ".gguf":
                return "holds a GGUF model, but only a name that ends in .gguf is taken for one; rename it"
            return (
                "is a .gguf file, which is there to be run (in Python by mobilellm.runtime.load); "
                "name the model directory it was made from"
            )
    return "is no model; name a model directory, a training run or a Hub id, or a .gguf file to run"


def local_path(source: str | Path) -> Path:
    """Where a source lies if it is no Hub id."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # ~ of a user there is not
        return Path(source)


def _download(
    repository: str, say: Callable[[str], None], revision: str | None, wanted: Sequence[str]
) -> Path:
    """Fetch (with huggingface_hub's progress bar) or find in its cache; say the licence first."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with hub_or_cache() as unreachable:
        licence = _licence(repository, revision)
        if licence is not None:
            say(f"{repository}: licence {licence}")
        try:
            directory = Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
            if licence is None:  # offline, and all of it was downloaded before
                say(f"{repository}: licence {stated_licence(directory) or 'unknown (no model card)'}")
            return directory
        except GatedRepoError:
            reason = "it is gated; accept its licence on the Hub and log in with `hf auth login`"
        except RepositoryNotFoundError:
            reason = "there is no such repository on the Hub, or it is private; check the spelling"
        except RevisionNotFoundError:
            reason = f"it has no revision {revision!r}"
        except LocalEntryNotFoundError:
            reason = (
                f"{unreachable or 'the Hub cannot be reached'}; nothing of it is in the local cache, so "
                "download it where there is a network and name the directory"
            )
        except HfHubHTTPError as error:
            reason = str(error).splitlines()[0]
    raise FileNotFoundError(f"{repository}: no such directory, and as a Hub id: {reason}")


def _licence(repository: str, revision: str | None) -> str | None:
    """The licence of the model card: it is the user's to obey, so it is shown before anything is fetched.

    None if the card cannot be reached.
    """
    from huggingface_hub import model_info

    try:
        card = model_info(repository, revision=revision, timeout=10).card_data
    except Exception:  # offline, gated, absent: the download itself says which
        return None
    return str(card.license) if card is not None and card.license else "not stated on the model card"
