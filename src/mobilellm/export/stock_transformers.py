"""A directory in stock transformers, in a process that never imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.chat_template import Message
from mobilellm.export.questions import Floats

_PROGRAM = """
import json, os, sys
import numpy as np
answers = sys.stdout
sys.stdout = sys.stderr
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
directory, place = sys.argv[1:]
with open(os.path.join(directory, "config.json")) as file:
    carries_code = "auto_map" in json.load(file)
model = AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, trust_remote_code=carries_code
).eval()
tokenizer = AutoTokenizer.from_pretrained(directory)
assert not any(name.split(".")[0] == "mobilellm" for name in sys.modules)


class Want(LogitsProcessor):
    def __init__(self, length, token):
        self.length, self.token = length, token

    def __call__(self, ids, scores):
        if ids.shape[1] == self.length:
            scores[:, self.token] = scores.max() + 1
        return scores


def name():
    return f"transformers {transformers.__version__}, {type(model).__name__}"


def encode(texts):
    return [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]


def chat(messages):
    if tokenizer.chat_template is None:
        return None
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def save(values):
    np.save(place, values.numpy())


def logits(tokens):
    save(model(torch.tensor([tokens]), use_cache=False).logits[0])


def steps(tokens):
    rows, past = [], None
    for token in tokens:
        out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0, -1])
    save(torch.stack(rows))


def greedy(prompt, most, forced):
    wants = [Want(len(prompt) + forced[0], forced[1])] if forced else []
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, logits_processor=wants
    )
    return out[0, len(prompt):].tolist()


asked = {"name": name, "encode": encode, "chat": chat, "logits": logits, "steps": steps, "greedy": greedy}
print("ready", file=answers, flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(asked[what](*arguments)), file=answers, flush=True)
"""


class StockTransformers:
    """See `Runtime`. The arithmetic is float32, whatever the weights are stored in."""

    def __init__(self, process: subprocess.Popen[str], place: Path, errors: Path) -> None:
        self._process, self._place, self._errors = process, place, errors
        self._line()
        self.name: str = self._asked("name")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._asked("encode", list(texts))
        return ids

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        ids: list[int] | None = self._asked("chat", [dict(message) for message in messages])
        return ids

    def logits(self, tokens: Sequence[int]) -> Floats:
        self._asked("logits", list(tokens))
        return self._saved()

    def steps(self, tokens: Sequence[int]) -> Floats:
        self._asked("steps", list(tokens))
        return self._saved()

    def greedy(self, prompt: Sequence[int], most: int, forced: tuple[int, int] | None = None) -> list[int]:
        tokens: list[int] = self._asked("greedy", list(prompt), most, forced)
        return tokens

    def _asked(self, what: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the next line tells why it ended
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        said = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"transformers: {said[-1] if said else 'the process ended without a word'}")

    def _saved(self) -> Floats:
        values: Floats = np.load(self._place)
        return values


@contextmanager
def stock_transformers(path: Path) -> Iterator[StockTransformers]:
    """Raises ValueError with what transformers said, for a directory it does not load or run."""
    with tempfile.TemporaryDirectory() as temporary:
        place, errors = Path(temporary) / "logits.npy", Path(temporary) / "errors.txt"
        with (
            errors.open("w", encoding="utf-8") as stream,
            subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(path), str(place)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
            ) as process,
        ):  # fmt: skip
            try:
                yield StockTransformers(process, place, errors)
            finally:
                process.kill()
