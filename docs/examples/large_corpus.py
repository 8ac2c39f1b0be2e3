"""A corpus larger than one machine: filtered, near-duplicates removed, tokenised into shards, by datatrove.

    python large_corpus.py slurm --input DIR --work DIR --tokenizer DIR --out SHARDS --tasks 1000
    python large_corpus.py ray   --input DIR --work DIR --tokenizer DIR --out SHARDS --tasks 1000
    python large_corpus.py local --input DIR --work DIR --tokenizer DIR --out SHARDS --tasks 8 --workers 4

Needs mobilellm[datatrove] (for Ray also `ray`) on every node, and folders that every node sees. Run it again
after a failure: what is complete is not done again. docs/large-corpora.md explains it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from mobilellm.data.datatrove_writer import MergeShards, ShardsWriter

SIMILAR = MinhashConfig(
    n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1")
)
"""Two texts that share 80 % of their runs of five words are found with probability 0.92. (datatrove's faster
hash, xxhash, must be older than version 4.)"""


class Words(WordTokenizer):
    """Words are what stands between white space. datatrove's own need a package a language."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def is_prose(document: Document) -> bool | tuple[bool, str]:
    """A filter that knows no language. datatrove.pipeline.filters has those of Gopher, C4 and FineWeb."""
    text = document.text
    if not 200 <= len(text) <= 1_000_000:
        return False, "length"
    if sum(map(str.isalpha, text)) < 0.6 * len(text):
        return False, "letters"
    return True


class Stage(NamedTuple):
    name: str
    tasks: int
    pipeline: list[Any]


def stages(settings: argparse.Namespace) -> Iterator[Stage]:
    """Each begins when the one before it is done. `signatures` and `shards` must read the same files."""
    work, tasks = settings.work, settings.tasks
    reader = {"jsonl": JsonlReader, "parquet": ParquetReader}[settings.reader]
    yield Stage("filter", tasks, [
        reader(settings.input, text_key=settings.text_field),
        LambdaFilter(is_prose, exclusion_writer=JsonlWriter(f"{work}/removed/filter")),
        JsonlWriter(f"{work}/filtered"),
    ])  # fmt: skip
    yield Stage("signatures", tasks, [
        JsonlReader(f"{work}/filtered"),
        MinhashDedupSignature(f"{work}/signatures", config=SIMILAR, language=Words()),
    ])  # fmt: skip
    yield Stage("buckets", SIMILAR.num_buckets, [
        MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=SIMILAR),
    ])  # fmt: skip
    yield Stage("clusters", 1, [
        MinhashDedupCluster(f"{work}/buckets", f"{work}/duplicates", config=SIMILAR),
    ])  # fmt: skip
    yield Stage("shards", tasks, [
        JsonlReader(f"{work}/filtered"),
        MinhashDedupFilter(f"{work}/duplicates", exclusion_writer=JsonlWriter(f"{work}/removed/similar")),
        ShardsWriter(f"{work}/parts", settings.tokenizer, settings.source or settings.input, settings.licence,
                     settings.held_out),
    ])  # fmt: skip
    yield Stage("merge", 1, [MergeShards(f"{work}/parts", settings.out)])


def executor(settings: argparse.Namespace) -> PipelineExecutor:
    """The last stage, which depends on the one before it, and so on: to run it is to run all of them."""
    made: Any = None
    for stage in stages(settings):
        shared = {
            "pipeline": stage.pipeline,
            "tasks": stage.tasks,
            "workers": settings.workers,
            "logging_dir": f"{settings.work}/logs/{stage.name}",
            "depends": made,
        }
        if settings.engine == "slurm":
            from datatrove.executor import SlurmPipelineExecutor

            made = SlurmPipelineExecutor(
                **shared,
                job_name=f"shards-{stage.name}",
                partition=settings.partition,
                time=settings.time,
                cpus_per_task=settings.cpus_per_task,
                # one task holds all pairs of similar texts
                mem_per_cpu_gb=settings.memory * (8 if stage.name == "clusters" else 1),
                env_command=settings.env_command,
                qos="",
            )
        elif settings.engine == "ray":
            from datatrove.executor import RayPipelineExecutor

            made = RayPipelineExecutor(
                **shared, cpus_per_task=settings.cpus_per_task, mem_per_cpu_gb=settings.memory
            )
        else:
            from datatrove.executor import LocalPipelineExecutor

            made = LocalPipelineExecutor(**shared)
    return made


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=("local", "slurm", "ray"))
    parser.add_argument("--input", required=True, help="folder of files; whatever fsspec can open, s3:// too")
    parser.add_argument("--work", required=True, help="folder for intermediate files, logs and the parts")
    parser.add_argument("--out", required=True, help="shards; on the file system of WORK, to be linked there")
    parser.add_argument("--tokenizer", required=True, help="directory of a tokenizer")
    parser.add_argument("--tasks", type=int, required=True, help="at most as many as there are files")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time; -1: as many as there are")
    parser.add_argument("--reader", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--source", default="", help="noted in the index; by default the input")
    parser.add_argument("--licence", default="not stated", help="of the text, noted in the index")
    parser.add_argument("--held-out", type=float, default=0.005, help="share of the documents")
    parser.add_argument("--cpus-per-task", type=int, default=1)
    parser.add_argument("--memory", type=int, default=4, help="GB a CPU")
    parser.add_argument("--partition", default="cpu", help="Slurm: where the jobs go")
    parser.add_argument("--time", default="20:00:00", help="Slurm: time limit of a task")
    parser.add_argument("--env-command", default=None, help="Slurm: command that activates the environment")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    executor(parsed()).run()
