"""[distill] of a recipe: the teacher's cache made complete, and the loader and the loss that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distillation import DistillChoice
    from mobilellm.train.distributed import LossFunction, World
    from mobilellm.train.feed import Loader
    from mobilellm.train.teacher import Teacher
    from mobilellm.train.teacher_cache import CacheIdentity, TeacherCache


def loss_function(choice: DistillChoice) -> LossFunction:
    from mobilellm.train.distillation_loss import distillation_loss

    return distillation_loss(choice.temperature, choice.ce_weight, choice.kl_weight)


def taught(
    choice: DistillChoice,
    loader: Loader,
    whole: Loader,
    steps: int,
    tokenizer: Tokenizer,
    world: World,
    quiet: bool,
) -> Loader:
    """`loader` with what the teacher says. Before, the teacher runs over what its cache lacks.

    `whole` deals out all rows of a step, `loader` this process's share. Says what it does unless `quiet`.
    Raises ValueError or FileNotFoundError for a teacher or a cache that does not fit.
    """
    from mobilellm.report.live_bar import LiveBar
    from mobilellm.train.teaching import TaughtLoader, fill

    say = _print if world.is_first and not quiet else _nothing
    teacher, cache = _opened(choice, tokenizer, world, say)
    with LiveBar(indent="      ", transient=True) as bar:

        def progress(done: int, of: int) -> None:
            if say is _print:
                bar.show(done, f"teacher: {done:,} of {of:,} passages", of)

        count = fill(cache, whole, steps, teacher, world, progress)
    size = sum(file.stat().st_size for file in choice.cache.glob("part-*.safetensors"))
    ran = f"the teacher ran over {count:,} passages" if count else "the teacher need not run"
    say(f"      distillation: {ran}; {len(cache):,} are in {choice.cache} ({size / 1e6:,.1f} MB)")
    return TaughtLoader(loader, cache, {"ce_weight": choice.ce_weight, "kl_weight": choice.kl_weight})


def _opened(
    choice: DistillChoice, tokenizer: Tokenizer, world: World, say: Callable[[str], None]
) -> tuple[Teacher | None, TeacherCache]:
    from mobilellm.cli.teachers import open_teacher
    from mobilellm.train.teacher_cache import CacheIdentity
    from mobilellm.train.teaching import open_together

    if choice.teacher is None:
        cache = open_together(choice.cache, None, world)
        _check_fit(choice, cache.identity, tokenizer)
        return None, cache
    teacher = open_teacher(choice.teacher, choice.dtype, world.device, tokenizer, say)
    if choice.top_k > teacher.vocab_size:
        raise ValueError(
            f"distill.top_k = {choice.top_k} is more than the teacher's vocabulary of {teacher.vocab_size} "
            "tokens; choose a smaller one"
        )
    identity = CacheIdentity(
        teacher.fingerprint,
        tokenizer.fingerprint,
        teacher.vocab_size,
        choice.top_k,
        choice.temperature,
        teacher.dtype,
    )
    return teacher, open_together(choice.cache, identity, world)


def _check_fit(choice: DistillChoice, there: CacheIdentity, tokenizer: Tokenizer) -> None:
    """Whether a cache without its teacher is what the recipe asks for."""
    if there.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"{choice.cache}: its teacher has another tokenizer than the data; choose another distill.cache"
        )
    asked: dict[str, Any] = {"top_k": choice.top_k, "temperature": choice.temperature}
    if choice.dtype is not None:
        asked["dtype"] = choice.dtype
    for name, value in asked.items():
        if value != getattr(there, name):
            raise ValueError(
                f"{choice.cache}: was made with {name} = {getattr(there, name)}; ask for that, or name the "
                "teacher and another distill.cache"
            )


def _print(line: str) -> None:
    print(line, flush=True)


def _nothing(line: str) -> None:
    pass
