"""What lies in an artefact, beside what its source and its scheme make one expect. Nothing is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np

from mobilellm.export.check import Check, count_check
from mobilellm.export.targets import Inventory

BYTES_BAR = 0.01
_METADATA_BYTES = 4096


def inventory_checks(found: Inventory, expected: Inventory) -> list[Check]:
    """Fields of the configuration, the head, tensors and their types, bytes: a check of each."""
    config, wanted = asdict(found.config), asdict(expected.config)
    runs = {"initializer_range", "tie_word_embeddings"}  # not stored everywhere; a check of its own
    differing = [
        f"{name} is {config[name]}, the source's {wanted[name]}"
        for name in wanted
        if name not in runs and not _same(config[name], wanted[name])
    ]
    off = abs(found.bytes - expected.bytes) - _METADATA_BYTES
    return [
        count_check("configuration", "fields", differing, "every field is the source's"),
        count_check("tied head", "heads", _head_faults(found, expected), "as in the source"),
        _tensor_check(found, expected),
        _type_check(found, expected),
        Check(
            "bytes", max(0.0, off / expected.bytes), BYTES_BAR, "of the prediction",
            f"{found.bytes:,} B, predicted {expected.bytes:,} B",
        ),
    ]  # fmt: skip


def _head_faults(found: Inventory, expected: Inventory) -> list[str]:
    if found.config.tie_word_embeddings == expected.config.tie_word_embeddings:
        return []
    words = {True: "tied to the embedding", False: "a matrix of its own"}
    return [
        f"the head is {words[found.config.tie_word_embeddings]}, in the source "
        f"{words[expected.config.tie_word_embeddings]}"
    ]


def _tensor_check(found: Inventory, expected: Inventory) -> Check:
    there, wanted = found.tensors, expected.tensors
    faults = [f"{name} is missing" for name in wanted if name not in there]
    faults += [f"{name} is too much" for name in there if name not in wanted]
    faults += [
        f"{name} has shape {list(there[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in there and there[name].shape != wanted[name].shape
    ]
    return count_check("tensors", "tensors", faults, f"all {len(wanted)} by name and shape")


def _type_check(found: Inventory, expected: Inventory) -> Check:
    faults = [
        f"{name} is {found.tensors[name].type}, expected {stored.type}"
        for name, stored in expected.tensors.items()
        if name in found.tensors and found.tensors[name].type != stored.type
    ]
    counts = Counter(stored.type for stored in expected.tensors.values())
    return count_check(
        "types", "tensors", faults, ", ".join(f"{count} {kind}" for kind, count in counts.items())
    )


def _same(a: object, b: object) -> bool:
    """Numbers that a file holds in 32 bits are compared so."""
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.float32(a) == np.float32(b))
    return a == b
