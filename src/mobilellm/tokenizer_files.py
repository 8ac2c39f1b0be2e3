"""The files of a tokenizer as transformers knows them: tokenizer.json and the two small ones beside it.

Read strictly: a vocabulary in the Llama layout, merges, the Llama normaliser and nothing else, so that what
was read encodes exactly as the file says. Written so that stock transformers needs no code of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.atomic import atomic_write
from mobilellm.git_lfs import pointer_problem
from mobilellm.sentencepiece_model import SPACE, SPECIAL_PIECES
from mobilellm.tokenizer_merges import Merge

if TYPE_CHECKING:
    import tokenizers

NORMALIZER: dict[str, Any] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}

_UNK, _BOS, _EOS = SPECIAL_PIECES
_SPECIAL_TOKENS = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _UNK}
_NO_LENGTH_LIMIT = int(1e30)  # what transformers writes for "no limit"

_PROBES = (
    "Hello, world! It's 3.14 o'clock.",
    " one leading space",
    "    four, then  two   and three ",
    "def f(x):\n\tif x:\n        return  x\n\n\n",
    "naïve café — “quotes” … 中文 日本語 한국어 русский عربي",
    "🙂👩\u200d👩\u200d👧 e\u0301 \u00a0 \u200b ▁ \x00 \x7f",
    " ",
    "  ",
    "\n",
    "</s> <s> <0x41>",
    "1234567890 000 ======== ---- ////",
)
"""Texts on which a wrong conversion of a SentencePiece model shows."""


def backend(pieces: Sequence[str], merges: Sequence[Merge]) -> tokenizers.Tokenizer:
    """BPE over the whole text. Without special tokens, so that nothing in a text can become one."""
    import tokenizers  # here and below where it is needed: opening a model need not wait for it
    from tokenizers import models, normalizers

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, list(merges), unk_token=_UNK, fuse_unk=True, byte_fallback=True)
    result = tokenizers.Tokenizer(model)
    result.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return result


def read_tokenizer_json(path: Path) -> tuple[tuple[str, ...], tuple[Merge, ...]]:
    """Pieces in id order and merges in rank order. Raises ValueError with one line naming file and fault."""
    content = _read_json(path)
    for problem in _differences(content):
        raise ValueError(f"{path}: {problem}")
    vocabulary: dict[str, int] = content["model"]["vocab"]
    pieces = tuple(sorted(vocabulary, key=lambda piece: vocabulary[piece]))
    merges = tuple(_merge(path, entry) for entry in content["model"]["merges"])
    return pieces, merges


def config_repairs(path: Path) -> list[str]:
    """What in a tokenizer_config.json has to be set right, in sentences; nothing if there is no such file.

    Raises ValueError if it names other special tokens than <s>, </s> and <unk>: those cannot be honoured.
    """
    if not path.is_file():
        return []
    config = _read_json(path)
    found = {key: _token_name(config.get(key)) for key in (*_SPECIAL_TOKENS, "pad_token")}
    repairs = []
    if any(found[key] == "" for key in _SPECIAL_TOKENS):
        repairs.append(f"{path.name} has empty special tokens; using {_BOS}=1 {_EOS}=2 {_UNK}=0")
    for key, expected in _SPECIAL_TOKENS.items():
        if found[key] not in ("", None, expected):
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {expected!r} is supported")
    if found["pad_token"] not in ("", None, _UNK):
        repairs.append(f"{path.name} has the pad token {found['pad_token']}; using {_UNK}=0")
    return repairs


def json_disagreement(path: Path, encode: Callable[[Sequence[str]], list[list[int]]]) -> list[str]:
    """A sentence if the tokenizer.json at `path` does not encode hard texts as `encode` does, BOS left out.

    Any kind of tokenizer.json is run, not only the ones `read_tokenizer_json` accepts.
    """
    import tokenizers

    try:
        other = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        line = str(error).splitlines()[0]
        return [f"{path.name} cannot be read ({line}); using tokenizer.model"]
    other.encode_special_tokens = True
    encodings = other.encode_batch_fast(list(_PROBES), add_special_tokens=False)
    wrong = sum(encoding.ids != ids for encoding, ids in zip(encodings, encode(_PROBES), strict=True))
    if not wrong:
        return []
    return [
        f"{path.name} encodes {wrong} of {len(_PROBES)} probe texts differently from tokenizer.model; "
        "using tokenizer.model"
    ]


def added_pieces(path: Path) -> list[str]:
    """Names of the tokens a tokenizer.json adds to its vocabulary; [] if it cannot be read."""
    try:
        content = _read_json(path)
        return [name for name in _added_names(content) if name not in SPECIAL_PIECES]
    except ValueError:
        return []


def write_tokenizer_files(
    directory: Path, pieces: Sequence[str], merges: Sequence[Merge], model_max_length: int | None
) -> None:
    """Each file appears whole or not at all. `model_max_length` is in tokens."""
    import json

    names = _SPECIAL_TOKENS | {"pad_token": _UNK}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LENGTH_LIMIT if model_max_length is None else model_max_length,
        "padding_side": "left",  # generation continues the right end of every row
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    contents = {
        "tokenizer.json": _complete_backend(pieces, merges).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(names, indent=2),
    }
    for name, content in contents.items():
        with atomic_write(directory / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")


def _complete_backend(pieces: Sequence[str], merges: Sequence[Merge]) -> tokenizers.Tokenizer:
    """As stock transformers needs it: with the special tokens, <s> in front of a text, and a decoder."""
    from tokenizers import AddedToken, decoders, processors

    result = backend(pieces, merges)
    result.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL_PIECES])
    result.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A",
        pair=f"{_BOS} $A {_BOS}:1 $B:1",
        special_tokens=[(_BOS, SPECIAL_PIECES.index(_BOS))],
    )
    steps = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    result.decoder = decoders.Sequence(steps)
    return result


def _read_json(path: Path) -> dict[str, Any]:
    import json  # here: a .gguf file is opened without any

    if problem := pointer_problem(path):
        raise ValueError(f"{path}: {problem}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is no UTF-8, and what is no JSON
        raise ValueError(f"{path}: not JSON, or not all of it ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _differences(content: dict[str, Any]) -> Iterator[str]:
    """What sets a tokenizer.json apart from the one kind that is supported, the telling differences first."""
    model = content.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        yield "not a tokenizer.json: it has no model with a vocabulary"
        return
    if model.get("type") != "BPE":
        yield f"is a {model.get('type')} tokenizer; only BPE is supported"
        return
    vocabulary = model["vocab"]
    if not _is_numbered(vocabulary):
        yield "the ids of its vocabulary are not 0, 1, 2, ... without gaps"
        return
    for index, piece in enumerate(SPECIAL_PIECES):
        if vocabulary.get(piece) != index:
            found = vocabulary.get(piece, "missing")
            yield f"{piece} is {found}; only tokenizers with {piece}={index} are supported"
    if not isinstance(model.get("merges"), list):
        yield "its model has no list of merges"
    if not model.get("byte_fallback"):
        yield "its model has no byte_fallback, so it cannot spell every text"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            yield f"its model has {key}={model[key]!r}, which is not supported"
    extra = [name for name in _added_names(content) if name not in SPECIAL_PIECES]
    if extra:
        yield f"adds the tokens {', '.join(extra[:5])}; only {', '.join(SPECIAL_PIECES)} are supported"
    if content.get("normalizer") != NORMALIZER or content.get("pre_tokenizer") is not None:
        yield (
            "prepares text differently from SentencePiece (its normalizer or pre_tokenizer); "
            "put the model's tokenizer.model beside it"
        )


def _is_numbered(vocabulary: object) -> bool:
    """Whether this is an object of names with the ids 0, 1, 2, ... in any order."""
    if not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
        return False
    return sorted(vocabulary.values()) == list(range(len(vocabulary)))


def _added_names(content: dict[str, Any]) -> list[str]:
    tokens = content.get("added_tokens")
    if not isinstance(tokens, list):
        return []
    return [str(token.get("content")) for token in tokens if isinstance(token, dict)]


def _merge(path: Path, entry: object) -> Merge:
    """Older files write "left right", newer ones ["left", "right"]."""
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not isinstance(parts[0], str)
        or not isinstance(parts[1], str)
    ):
        raise ValueError(f"{path}: the merge {entry!r} is no pair of pieces")
    return parts[0], parts[1]


def _token_name(value: object) -> str | None:
    """A token is given by its name, or by an object with its name in `content`."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None
