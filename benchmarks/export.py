"""Seconds, peak memory and bytes of an export to .gguf, and what the comparison with the source adds.

    python benchmarks/export.py MODEL --json docs/results/export.json

Every export is the command line in a process of its own, imports included: `mobilellm export MODEL OUT
--type T --no-verify`, as often as --runs says, of which the median counts; and once with the comparison.
Peak memory is the most the process held, libraries and the mapped weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

CHILD = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stderr or done.stdout)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": used.ru_maxrss * 1024,
                  "cpu_seconds": used.ru_utime + used.ru_stime}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    results: dict[str, Any] = {"model": arguments.model.name, "model_bytes": weights}
    for kind in arguments.types:
        with tempfile.TemporaryDirectory() as folder:
            plain = [
                exported(arguments.model, Path(folder) / f"{run}.gguf", kind, "--no-verify")
                for run in range(arguments.runs)
            ]
            compared = exported(arguments.model, Path(folder) / "m.gguf", kind, "--runtime", "engine")
            peak = max(run["peak_bytes"] for run in plain)
            results[kind] = {
                "bytes": (Path(folder) / "m.gguf").stat().st_size,
                "seconds": statistics.median(run["seconds"] for run in plain),
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in plain),
                "peak_bytes": peak,
                "peak_in_models": round(peak / weights, 2),
                "with_comparison": compared,
            }
    machine.write(arguments.json, results)


def exported(model: Path, out: Path, kind: str, *options: str) -> dict[str, float]:
    command = [sys.executable, "-m", "mobilellm", "export", str(model), str(out), "--type", kind, *options]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


if __name__ == "__main__":
    main()
