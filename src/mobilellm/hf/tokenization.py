"""AutoTokenizer on the official directories.

They hold a tokenizer.model and a tokenizer_config.json that names LlamaTokenizer and three empty special
tokens. Stock transformers 5 recurses without end on that, and its conversion of a tokenizer.model gives other
ids than SentencePiece. Here `mobilellm.tokenizer` reads such a directory.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mobilellm.chat_template import stored_template
from mobilellm.tokenizer import Tokenizer

_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
_IGNORED_ARGUMENTS = (
    *_HUB_ARGUMENTS,
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "legacy",
    "trust_remote_code",
)
_FILES = ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]

logger = logging.getLogger(__name__)


def load_tokenizer(directory: str | Path, **kwargs: Any) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a model directory, as transformers has it: <s> (1) in front, eos 2, unk and pad 0, and
    the chat template that lies there.

    `kwargs` are those of `PreTrainedTokenizerFast.from_pretrained`, e.g. padding_side. Raises
    FileNotFoundError or ValueError as `Tokenizer.load` does.
    """
    tokenizer = Tokenizer.load(directory)
    for repair in tokenizer.repairs:
        logger.warning("%s: %s", directory, repair)
    with tempfile.TemporaryDirectory() as temporary:  # what a saved directory holds is what stands in memory
        tokenizer.save(temporary)
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(temporary, **kwargs)
    fast.name_or_path = str(directory)
    if fast.chat_template is None:
        fast.chat_template = stored_template(Path(directory))
    return fast


class LlamaTokenizer(transformers.LlamaTokenizer):  # type: ignore[misc]
    """Stands in for transformers' LlamaTokenizer where AutoTokenizer looks a class up by that name.

    MobileLLM directories go to `load_tokenizer`; all others to the stock class, which knows nothing of this.
    """

    # A class from elsewhere would count as the user's choice against tokenizer code in a directory.
    __module__ = transformers.LlamaTokenizer.__module__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any) -> Any:
        """A PreTrainedTokenizerFast for MobileLLM, a stock LlamaTokenizer for everything else."""
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if not _is_mobilellm(source, hub):
            return transformers.LlamaTokenizer.from_pretrained(source, *inputs, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in _IGNORED_ARGUMENTS}
        return load_tokenizer(_directory(source, hub), **options)


def _is_mobilellm(source: str | Path, hub: dict[str, Any]) -> bool:
    """Either the config says so, or the special tokens are empty: the 1.5B is a plain Llama otherwise."""
    if Path(source).is_file():
        return False
    tokens = get_tokenizer_config(source, **hub)
    if all(tokens.get(f"{name}_token") == "" for name in ("bos", "eos", "unk")):
        return True
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(source, **hub)
    except OSError:  # a tokenizer without a model
        return False
    return bool(config.get("model_type") == "mobilellm")


def _directory(source: str | Path, hub: dict[str, Any]) -> Path:
    arguments = dict(hub)
    inner = arguments.pop("subfolder", None) or ""
    if Path(source).is_dir():
        return Path(source) / inner
    from huggingface_hub import snapshot_download

    arguments.pop("proxies", None)
    patterns = [str(Path(inner) / name) for name in _FILES]
    return Path(snapshot_download(str(source), allow_patterns=patterns, **arguments)) / inner
