from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.gguf import read_gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file by the gguf package with every kind of value."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 1)
    writer.add_int8("i8", -1)
    writer.add_uint16("u16", 2)
    writer.add_int16("i16", -2)
    writer.add_uint32("u32", 3)
    writer.add_int32("i32", -3)
    writer.add_uint64("u64", 4)
    writer.add_int64("i64", -4)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.25)
    writer.add_bool("yes", True)
    writer.add_string("text", "wörd")
    writer.add_array("texts", ["a", "", "中"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_gguf_package_writes_is_read(written: Path) -> None:
    file = read_gguf(written)
    metadata = {
        key: file.metadata[key] for key in file.metadata if not isinstance(file.metadata[key], np.ndarray)
    }
    assert list(metadata.pop("texts")) == ["a", "", "中"]
    assert metadata == {
        "general.architecture": "llama", "u8": 1, "i8": -1, "u16": 2, "i16": -2, "u32": 3, "i32": -3, "u64": 4,
        "i64": -4, "f32": 0.5, "f64": 0.25, "yes": True, "text": "wörd",
    }  # fmt: skip
    assert file.metadata["yes"] is True
    assert file.metadata["numbers"].tolist() == [1, 2, 3]
    assert file.metadata["floats"].tolist() == [0.5, 1.5]
    np.testing.assert_array_equal(file.array("first"), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert file.array("second").tolist() == [0, 1, 2, 3]
    assert file.tensors["second"].type.name == "F16"


def test_a_file_cut_off_anywhere_is_refused_in_one_line(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    last = max(info.offset + info.nbytes for info in read_gguf(written).tensors.values())
    for size in {*range(0, len(whole) - 1, 7), last - 1}:
        if size >= last:
            continue
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: ") as caught:
            read_gguf(cut)
        assert "\n" not in str(caught.value)


def changed(whole: bytes, at: int, layout: str, value: int) -> bytes:
    return whole[:at] + struct.pack(layout, value) + whole[at + struct.calcsize(layout) :]


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "<I", 0, "is no GGUF file: it begins with"),
        (4, "<I", 2, "is GGUF version 2; only version 3 is read"),
        (8, "<Q", 2**63, "tensors at byte"),
        (16, "<Q", 2**40, "metadata pairs at byte"),
        (24, "<Q", 2**64 - 1, "bytes at byte"),
    ],
)
def test_a_wrong_head_is_refused(
    written: Path, tmp_path: Path, at: int, layout: str, value: int, message: str
) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(changed(written.read_bytes(), at, layout, value))
    with pytest.raises(ValueError, match=r"bad\.gguf: ") as caught:
        read_gguf(file)
    assert message in str(caught.value)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_files_are_read_or_refused(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 9))
        kind = data.draw(st.sampled_from(["byte", "u32", "u64"]))
        if kind == "byte":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "u32":
            whole[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1])))
        else:
            whole[at : at + 8] = struct.pack(
                "<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))
            )
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(whole)
    refusal = ""
    try:
        file = read_gguf(path)
        for name in file.tensors:
            file.array(name)
    except ValueError as error:
        refusal = str(error)
    assert not refusal or (str(path) in refusal and "\n" not in refusal)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    def tensor(name: bytes, offset: int) -> bytes:
        return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 0, offset)

    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensor(b"a", 0) + tensor(b"b", 16)
    path = tmp_path / "overlap.gguf"
    path.write_bytes(head + bytes(-len(head) % 32 + 64))
    with pytest.raises(ValueError, match="'b' overlaps another one"):
        read_gguf(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match="is a directory"):
        read_gguf(tmp_path)
