"""The files of a run's checkpoints: their names, what state.json says, and whether they are what was written.

Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mobilellm.atomic import hold, sync
from mobilellm.data.shards import file_sha256
from mobilellm.train.schedule import learning_rate_factor
from mobilellm.train.settings import ScheduleSettings

if TYPE_CHECKING:
    from mobilellm.train.distributed import World

_NAME = re.compile(r"step-([0-9]+)")
_REMAINS = re.compile(r"step-[0-9]+\.(tmp|deleted)")


class RunState(NamedTuple):
    step: int  # steps done
    loader: dict[str, Any]
    identity: dict[str, Any]  # of the recipe: a checkpoint of another run is refused
    losses: tuple[float, ...] = ()  # the last ones, by which the guard knows a spike; newest last


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first (an unfinished one still has its temporary name)."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def is_remains(path: Path) -> bool:
    """Whether a killed process was writing or deleting a checkpoint there."""
    return _REMAINS.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


def drop_old(directory: Path, keep_last: int, milestone_every: int = 0) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of steps divisible by `milestone_every`."""
    for old in checkpoints(directory)[:-keep_last]:
        if not (milestone_every and step_of(old) % milestone_every == 0):
            # A kill while the files go must not leave what looks like a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.deleted")))


@contextlib.contextmanager
def only_run(directory: Path, world: World) -> Iterator[None]:
    """Hold the folder of a run for this world, and clear what a killed one left half done.

    Raises ValueError while another process holds it.
    """
    if not world.is_first:
        world.agree(None)
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    problem = None
    with contextlib.ExitStack() as stack:
        busy = f"{directory}: another process is training there; wait for it or use another folder"
        try:
            stack.enter_context(hold(directory, busy))
        except ValueError as error:  # all are to hear of it
            problem = str(error)
        if problem is None:
            for path in directory.iterdir():
                if is_remains(path):
                    shutil.rmtree(path)
        world.agree(problem)
        yield


def write_state(directory: Path, state: RunState, sums: Mapping[str, str]) -> None:
    """Write state.json into a checkpoint, to the disk; `sums` is the sha256 of its files by name."""
    values = state._asdict() | {"files": dict(sums)}
    with (directory / "state.json").open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(values | {"sha256": _digest(values)}, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    sync(directory)


def read_state(directory: Path) -> tuple[RunState, dict[str, str]]:
    """What state.json of a checkpoint says, and the sha256 of its files. Raises ValueError for damage."""
    file = directory / "state.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        written = values.pop("sha256", None)  # checkpoints from before it was there go on without
        digest = _digest(values)
        sums = values.pop("files")
        losses = values.pop("losses", [])  # checkpoints from before there were any go on without
        if type(losses) is not list or not all(type(x) is float and math.isfinite(x) for x in losses):
            raise ValueError(f"losses in {file.name} must be finite numbers")
        state = RunState(**values, losses=tuple(losses))
        for field, kind in (("step", int), ("loader", dict), ("identity", dict)):
            if type(getattr(state, field)) is not kind:
                raise ValueError(f"{field} in {file.name} must be {kind.__name__}")
        if type(sums) is not dict or not sums or any(Path(name).name != name for name in sums):
            raise ValueError(f"files in {file.name} must name the files beside it")
        if written not in (None, digest):
            raise ValueError(f"{file.name} is not what was written (its sha256 differs)")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise damaged(directory, " ".join(str(error).split()) or type(error).__name__) from None
    return state, sums


def _digest(values: Mapping[str, Any]) -> str:
    """sha256 of what state.json says beside it: a wrong place in the data would pass for a right one."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def difference(path: Path, state: RunState, identity: dict[str, Any]) -> str | None:
    """How the run of a checkpoint differs from the one of `identity`, as an error says it.

    Another length or schedule is the same run while no step that is done would have had another learning
    rate: a run by `wsd` can be made longer, or be let decay, from any checkpoint at its peak.
    """
    ours = json.loads(json.dumps(identity))
    differing = {
        name for name in ours.keys() | state.identity.keys() if ours.get(name) != state.identity.get(name)
    }
    ahead, done = {name for name in differing if name == "steps" or name.startswith("schedule.")}, state.step
    if ahead and done <= ours["steps"] and _rates(ours, done) == _rates(state.identity, done):
        differing -= ahead
    if not differing:
        return None
    differences = [
        f"{name} = {state.identity.get(name)!r}, not {ours.get(name)!r}" for name in sorted(differing)
    ]
    return (
        f"{path}: belongs to a run with other settings ({'; '.join(differences)}); "
        "use another folder or the same settings"
    )


def _rates(identity: Mapping[str, Any], steps: int) -> list[float]:
    """What the first `steps` steps of a run had as learning rate, as fractions of its peak."""
    fields = {name: identity.get(f"schedule.{name}") for name in ScheduleSettings.__dataclass_fields__}
    schedule = ScheduleSettings(**{name: value for name, value in fields.items() if value is not None})
    return [learning_rate_factor(step, identity["steps"], schedule) for step in range(steps)]


def damage(path: Path, sums: Mapping[str, Any]) -> str:
    """What is wrong with the files that `sums` names, or ""."""
    for name, wanted in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != wanted:
            return f"{name} is not what was written (its sha256 differs)"
    return ""


def strangers(path: Path, sums: Mapping[str, Any]) -> str:
    """The reader takes whatever ends so: a file that was not written here must not be read with the rest."""
    names = [file.name for file in path.glob("*.safetensors") if file.name not in sums]
    return f"it holds {', '.join(sorted(names))}, which was not written with it" if names else ""


def damaged(path: Path, reason: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{path}: damaged checkpoint ({reason}); delete it to resume from the one before")
