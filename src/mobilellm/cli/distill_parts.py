"""[distill] of a recipe: the teacher's cache made complete, and the loader and the loss that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distillation import DistillChoice
    from mobilellm.train.distributed import LossFunction, World
    from mobilellm.train.feed import Loader
    from mobilellm.train.recipe import Recipe
    from mobilellm.train.teacher import Teacher
    from mobilellm.train.teacher_cache import CacheIdentity, TeacherCache
    from mobilellm.train.teacher_cost import Teaching


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


def planned(
    choice: DistillChoice, whole: Loader | None, tokenizer: Tokenizer | None, recipe: Recipe, on_gpu: bool
) -> Teaching:
    """What `taught` would do, which is not done; it raises what that raises.

    Without `whole`, the loader of all rows of a step, and `tokenizer`, which come with data, as if nothing of
    a run came twice and nothing were in the cache.
    """
    from mobilellm.cli.teachers import look_at_teacher
    from mobilellm.train.teacher import check_context, check_top_k
    from mobilellm.train.teacher_cache import open_cache, place_bytes
    from mobilellm.train.teacher_cost import Teaching, all_of
    from mobilellm.train.teaching import lack_of, nobody_to_ask

    batch, shape, cache = recipe.batch, None, None
    if choice.teacher is not None:
        shape = look_at_teacher(choice.teacher, choice.dtype, tokenizer, _nothing)
        check_top_k(choice.top_k, shape.vocab_size)
    if tokenizer is not None:
        cache = _cache_there(choice, tokenizer)
    elif shape is None:
        open_cache(choice.cache, None)
    lack = (
        all_of(recipe.steps, batch.sequences_per_step, batch.sequence_length)
        if whole is None
        else lack_of(cache, whole, recipe.steps)
    )
    folder, held = str(choice.cache), 0 if cache is None else len(cache)
    if shape is None:
        if whole is not None and cache is not None and lack.passages:
            raise nobody_to_ask(cache, lack.passages)
        return Teaching(None, None, 0, 0, False, 0.0, 0, folder, held, 0)
    if whole is not None:
        check_context(shape.name, shape.context, lack.longest)
    width = 2 if choice.dtype == "bfloat16" else 4
    return Teaching(
        teacher=shape.name,
        parameters=shape.parameters,
        passages=lack.passages,
        tokens=lack.tokens,
        at_most=whole is None,
        flops=shape.flops(lack),
        memory_bytes=shape.memory_bytes(lack.longest, width, on_gpu),
        cache=folder,
        cache_passages=held,
        cache_bytes_added=lack.places * place_bytes(shape.vocab_size, choice.top_k),
    )


def _cache_there(choice: DistillChoice, tokenizer: Tokenizer) -> TeacherCache | None:
    """The cache that a run would find; None where it would make one.

    Whether one is this teacher's is told by its weights, for which it is loaded.
    """
    import torch

    from mobilellm.cli.teachers import open_teacher
    from mobilellm.train.teacher_cache import has_cache, open_cache

    if choice.teacher is None:
        cache = open_cache(choice.cache, None)
        _check_fit(choice, cache.identity, tokenizer)
        return cache
    if not has_cache(choice.cache):
        return None
    teacher = open_teacher(choice.teacher, choice.dtype, torch.device("cpu"), tokenizer, _nothing)
    return open_cache(choice.cache, _identity(choice, teacher, tokenizer))


def _opened(
    choice: DistillChoice, tokenizer: Tokenizer, world: World, say: Callable[[str], None]
) -> tuple[Teacher | None, TeacherCache]:
    from mobilellm.cli.teachers import open_teacher
    from mobilellm.train.teacher import check_top_k
    from mobilellm.train.teaching import open_together

    if choice.teacher is None:
        cache = open_together(choice.cache, None, world)
        _check_fit(choice, cache.identity, tokenizer)
        return None, cache
    teacher = open_teacher(choice.teacher, choice.dtype, world.device, tokenizer, say)
    check_top_k(choice.top_k, teacher.vocab_size)
    return teacher, open_together(choice.cache, _identity(choice, teacher, tokenizer), world)


def _identity(choice: DistillChoice, teacher: Teacher, tokenizer: Tokenizer) -> CacheIdentity:
    from mobilellm.train.teacher_cache import CacheIdentity

    return CacheIdentity(
        teacher.fingerprint,
        tokenizer.fingerprint,
        teacher.vocab_size,
        choice.top_k,
        choice.temperature,
        teacher.dtype,
    )


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
