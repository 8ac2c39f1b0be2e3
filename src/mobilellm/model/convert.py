"""Any layout in, one clean directory out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm import hub
from mobilellm.chat_template import stored_template
from mobilellm.licence import licence_files, stated_licence
from mobilellm.model import checkpoint
from mobilellm.model.api import read_tokenizer
from mobilellm.model.tensor_files import CheckpointError


def convert(
    source: str | Path,
    destination: str | Path,
    layout: str,
    dtype: str | None,
    unrolled: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Convert a model and return what was done, repairs too; notices go to `say`, a line each.

    Licence texts, model card and chat template are carried along: the result stays under the licence of its
    source.

    Without a dtype the stored one is kept. Raises what reading and `checkpoint.save` raise.
    """
    directory = hub.resolve(source, say)
    weights = checkpoint.read_weights(directory)
    if weights.quantized is not None:
        raise CheckpointError(f"{source}: {checkpoint.cannot_be_plain(weights.quantized.quantization)}")
    tokenizer = read_tokenizer(directory, weights.config)
    repairs = weights.repairs + (tokenizer.repairs if tokenizer else ())
    if tokenizer is None:
        say(f"{source}: has no tokenizer, so the result has none")
    wanted = checkpoint.torch_dtype(dtype) if dtype else checkpoint.stored_dtype(weights)
    model = checkpoint.build(weights, wanted)
    if unrolled and weights.config.shares_layers:
        model = checkpoint.unroll(model)
        say(f"unrolled: {weights.config.num_layers} stored blocks become {model.config.num_layers}")
    licence = stated_licence(directory)
    template = stored_template(directory)
    checkpoint.save(destination, model, tokenizer, layout, overwrite, licence_files(directory), template)
    return {
        "source": str(source),
        "destination": str(destination),
        "layout": layout,
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored blocks": model.config.num_layers,
        "executed steps": model.config.num_steps,
        "tokens": tokenizer.vocab_size if tokenizer else None,
        "repairs": list(repairs),
        "licence": licence,
    }
