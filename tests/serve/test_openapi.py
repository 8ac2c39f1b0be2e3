"""The OpenAPI document is true: schemathesis makes requests of it, and broken ones, and checks the answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, serving

pytest.importorskip("schemathesis", reason="needs schemathesis (extra test)")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
PATHS = {
    "/health", "/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions", "/metrics",
    "/openapi.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def short(chat_file: Path) -> Iterator[Running]:
    """Answers are short, so that there is time for many."""
    with serving(chat_file, "--max-new-tokens", "4") as running:
        yield running


def explore(server: Running, folder: Path, *flags: str) -> None:
    assert set(server.client.get("/openapi.json").json()["paths"]) == PATHS
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", CHECKS,
               "--no-color", "--generation-database", "none", "--suppress-health-check", "all",
               "--seed", "1", *flags]  # fmt: skip
    done = subprocess.run(
        command, check=False, cwd=folder, env=os.environ | {"COLUMNS": "150"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert not any("Traceback" in line for line in server.said)
    assert server.chat(max_tokens=2).status_code == 200


def test_the_document_is_true(short: Running, tmp_path: Path) -> None:
    explore(short, tmp_path, "--phases", "fuzzing", "--max-examples", "5")


@pytest.mark.slow
def test_the_document_is_true_of_many_requests(short: Running, tmp_path: Path) -> None:
    explore(short, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", "200")
