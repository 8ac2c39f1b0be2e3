"""Answer over HTTP as OpenAI's interface has it, with a page to chat at /.

MODEL is a .gguf file, a directory for ONNX Runtime or ExecuTorch, a model directory, a training run, or a Hub
id. Only this machine can reach it unless --host says otherwise, which takes a key. Ctrl-C ends it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from mobilellm.cli.engine_flags import KVCache, Threads
from mobilellm.cli.notices import say
from mobilellm.serve.settings import Access, Limits

KEY_VARIABLE = "MOBILELLM_API_KEY"


@dataclass
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """.gguf file, exported directory, model directory, training run, or Hub id (org/name)."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one, and takes a key or --allow-anyone."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """Wanted of every request. Others on this machine can see it here: better a file or MOBILELLM_API_KEY."""
    api_key_file: Path | None = None
    """File with the key on its first line."""
    allow_anyone: bool = False
    """Let others reach it without a key."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another name under which it may be called, behind a proxy say; may be given several times."""
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Origin (https://name:port) of a site whose pages may ask; may be given several times."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    threads: Threads = None
    kv_cache: KVCache = "f16"
    log: Path | None = None
    """Write the access log to this file, added to what is there, in place of standard error."""
    log_text: bool = False
    """Write prompts and answers into the access log too."""


def run(arguments: Arguments) -> None:
    access = Access(
        host=arguments.host,
        key=_key(arguments),
        allow_anyone=arguments.allow_anyone,
        hosts=arguments.allow_host,
        origins=arguments.allow_origin,
    )
    if not 0 <= arguments.port <= 65535:
        raise ValueError(f"port = {arguments.port} must be in 0 … 65535")
    from mobilellm.artefacts.text_model import open_text_model
    from mobilellm.serve.access_log import AccessLog
    from mobilellm.serve.app import Service
    from mobilellm.serve.server import Server, bind, url

    with ExitStack() as open_files:
        bound = open_files.enter_context(bind(arguments.host, arguments.port))
        log: TextIO = sys.stderr
        if arguments.log is not None:
            log = open_files.enter_context(arguments.log.open("a", encoding="utf-8"))
        model = open_text_model(arguments.model, arguments.threads, say, arguments.kv_cache)
        service = Service(model, arguments.limits)
        server = Server(service, access, AccessLog(log, arguments.log_text))
        kind = "" if service.model.chat_template else ", a base model: /v1/completions only"
        say(f"{service.preparer.name}{kind}, at {url(bound, arguments.host)} (Ctrl-C ends it)")
        server.run([bound])


def _key(arguments: Arguments) -> str | None:
    """From the one place that gives it."""
    from_environment = os.environ.get(KEY_VARIABLE)
    if arguments.api_key is not None and arguments.api_key_file is not None:
        raise ValueError(f"api_key_file = {arguments.api_key_file} goes without --api-key; leave one out")
    if arguments.api_key_file is not None:
        return (arguments.api_key_file.read_text(encoding="utf-8").splitlines() or [""])[0].strip()
    return arguments.api_key if arguments.api_key is not None else from_environment
