"""What a chat run reads: conversations, the model's tokenizer and template, held-out loss, sample answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.cli.shard_text import check_samples
from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    from mobilellm.chat_template import ChatTemplate
    from mobilellm.data.chat import Conversations, ReadChat, Skip
    from mobilellm.data.chat_loader import ChatLoader, ChatRows
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distributed import World

_PROBE = [
    {"role": role, "content": content}
    for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
]
_ROWS_AT_ONCE = 8


class ChatText:
    """The files of `recipe.chat`. See `run_parts.RunText`."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.chat is not None
        self._recipe, self._chat = recipe, recipe.chat
        self._quiet = True

    @property
    def is_there(self) -> bool:
        return True  # the model is, whose tokenizer tells how many sequences files make; those are needed

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own. Raises what reading it raises."""
        from mobilellm.model.api import read_tokenizer
        from mobilellm.model_directory import read_config_file

        tokenizer = read_tokenizer(self._source, read_config_file(self._source).config)
        if tokenizer is None:
            raise FileNotFoundError(
                f"train: model.init_from = {self._recipe.model.init_from} has no tokenizer.json or "
                "tokenizer.model, so it cannot read conversations; put one beside the weights"
            )
        return tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        """The recipe's, else the model's own, else ours. Raises ValueError for one not fit to train with."""
        from mobilellm.chat_template import DEFAULT, ChatTemplate, read_template, stored_template

        file = self._chat.template
        own = stored_template(self._source) or DEFAULT
        template = ChatTemplate(own if file is None else read_template(file), self.tokenizer)
        template.conversation(_PROBE)
        return template

    @property
    def chat_template(self) -> str:
        return self.template.source

    def read(self, quiet: bool) -> None:
        """Read and encode the files, with a bar, and say what was left out, unless `quiet`."""
        self._quiet = quiet
        parts = [self._train, *([self._held_out] if self._chat.held_out else [])]
        if quiet:
            return
        from mobilellm.data.chat import said

        for part in parts:
            kept, skipped = len(part.conversations), len(part.skips)
            names = ", ".join(map(str, self._chat.train if part is self._train else self._chat.held_out))
            cut = f", {part.truncated:,} of them cut" if part.truncated else ""
            left_out = f"; left out: {said(part.counts)}" if skipped else ""
            print(f"{names}: {kept:,} of {kept + skipped:,} conversations{cut}{left_out}")

    @property
    def left_out(self) -> list[Skip]:
        return self._train.skips + (self._held_out.skips if self._chat.held_out else [])

    @property
    def sequences(self) -> int:
        return self._rows.num_rows

    def loader(self, world: World) -> ChatLoader:
        """This process's share of the training conversations."""
        from mobilellm.data.chat_loader import ChatLoader

        return ChatLoader(self._rows, self._recipe.batch.sequences_per_step, world.rank, world.size)

    def evaluator(self, world: World) -> Callable[[MobileLLM, int], Mapping[str, float]] | None:
        """Held-out loss and perplexity of the targets that count; ranks share the work. None without any."""
        rows = self._held_out_rows
        if rows is None:
            return None
        import torch

        from mobilellm.eval.perplexity import Perplexity
        from mobilellm.train.loss import weighted_loss

        protocol = self.protocol(world)
        half = protocol["precision"] == "bfloat16"
        count = min(rows.num_rows, max(1, protocol["most_tokens"] // protocol["window"]))
        firsts = range(0, count, _ROWS_AT_ONCE)

        @torch.no_grad()
        def evaluate(model: MobileLLM, step: int) -> Mapping[str, float]:
            nats = targets = 0.0
            model.eval()
            for turn in range(0, len(firsts), world.size):  # all ranks take as many: fsdp gathers in each
                mine = turn + world.rank
                first = firsts[min(mine, len(firsts) - 1)]
                batch = rows.batch(first, min(_ROWS_AT_ONCE, count - first))
                tensors = [torch.from_numpy(part).to(world.device) for part in batch if part is not None]
                with torch.autocast(world.device.type, torch.bfloat16, half):
                    loss = weighted_loss(model, *tensors[:3], segments=tensors[3])
                if mine < len(firsts):
                    nats, targets = nats + loss.item(), targets + float(batch.weights.sum())
            nats, targets = world.sum([nats, targets])
            result = Perplexity(nats, int(targets))
            return {"loss": result.loss, "perplexity": result.perplexity}

        return evaluate

    def protocol(self, world: World) -> dict[str, Any]:
        """How the held-out numbers come about, as `ShardText.protocol`; of each conversation by itself."""
        from mobilellm.train.distributed import evaluation_precision

        recipe = self._recipe
        return {
            "window": recipe.batch.sequence_length,
            "targets": "assistant" if self._chat.assistant_only else "all",
            "precision": evaluation_precision(world, recipe.compute),
            "most_tokens": self._chat.held_out_tokens,
        }

    def speaker(self) -> Callable[[MobileLLM, int], list[tuple[str, str]]] | None:
        """Answers to `sample.prompts`, each asked by itself."""
        recipe = self._recipe
        if not recipe.sample.prompts:
            return None
        import torch

        from mobilellm.model.generate import generate_tokens
        from mobilellm.sampling import Sampling

        prompts = [
            self.template.prompt([{"role": "user", "content": text}]) for text in recipe.sample.prompts
        ]

        check_samples(recipe, prompts, self.tokenizer.vocab_size)

        def speak(model: MobileLLM, step: int) -> list[tuple[str, str]]:
            model.eval()
            sampling = Sampling(temperature=recipe.sample.temperature, seed=recipe.seed)
            answers: list[list[int]] = [[] for _ in prompts]
            with torch.compiler.set_stance("force_eager"):  # compiled is training's way through the blocks
                for new in generate_tokens(
                    model, prompts, sampling, recipe.sample.tokens, vocabulary=self.tokenizer.vocab_size
                ):
                    answers[new.row] += [] if new.token is None else [new.token]
            model.inference_layout = None  # a copy of the weights that training has no use for
            said = [self.tokenizer.decode(answer) for answer in answers]
            return list(zip(recipe.sample.prompts, said, strict=True))

        return speak

    @cached_property
    def _source(self) -> Path:
        from mobilellm import hub

        assert self._recipe.model.init_from is not None
        return hub.resolve(self._recipe.model.init_from, lambda notice: None)

    @cached_property
    def _train(self) -> ReadChat:
        return self._read(self._chat.train)

    @cached_property
    def _held_out(self) -> ReadChat:
        return self._read(self._chat.held_out)

    def _read(self, files: Sequence[Path]) -> ReadChat:
        from mobilellm.data.chat import read_chat
        from mobilellm.report.live_bar import LiveBar

        with LiveBar(transient=True) as bar:

            def report(records: int) -> None:
                if not self._quiet and records % 100 == 0:
                    bar.show(records, f"{records:,} conversations read")

            most = self._recipe.batch.sequence_length + 1
            return read_chat(files, self.template, most, self._chat.over_long == "truncate", report)

    @cached_property
    def _parts(self) -> tuple[Conversations, Conversations | None]:
        """To train on and to hold out."""
        from mobilellm.data.chat import held_out_ones

        whole = self._train.conversations
        if self._chat.held_out:
            return whole, self._held_out.conversations
        chosen = held_out_ones(whole, self._chat.held_out_fraction)
        if chosen.all():
            raise ValueError(
                f"train: all of the {len(whole)} conversations would be held out; give more, name files with "
                "--chat.held-out, or hold none out with --chat.held-out-fraction 0"
            )
        return whole.those(~chosen), whole.those(chosen) if chosen.any() else None

    @cached_property
    def _rows(self) -> ChatRows:
        return self._rows_of(self._parts[0])

    @cached_property
    def _held_out_rows(self) -> ChatRows | None:
        part = self._parts[1]
        return None if part is None else self._rows_of(part)

    def _rows_of(self, conversations: Conversations) -> ChatRows:
        from mobilellm.data.chat_loader import ChatRows

        chat, recipe = self._chat, self._recipe
        return ChatRows(
            conversations, recipe.batch.sequence_length, recipe.seed, chat.packing, chat.assistant_only
        )
