import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from nvfp4check.checkpoint.header import DTYPE_BITS, HeaderError, ShardHeader, read_header
from nvfp4check.checkpoint.storage import LocalStorage
from nvfp4check.checkpoint.writing import TensorSpec, encode_header, frame_header

SHARD = "model.safetensors"


def read_bytes(directory: Path, raw: bytes) -> ShardHeader:
    (directory / SHARD).write_bytes(raw)
    return read_header(LocalStorage(directory), SHARD)


def read_entries(directory: Path, data_bytes: int, **entries: Any) -> ShardHeader:
    return read_bytes(directory, frame_header(entries) + bytes(data_bytes))


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_names_places_and_metadata_are_read_as_the_library_wrote_them(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((), np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / SHARD, metadata={"format": "pt"})
    header = read_header(LocalStorage(tmp_path), SHARD)
    raw = (tmp_path / SHARD).read_bytes()
    found = {e.name: (e.dtype, e.shape, raw[e.start : e.stop]) for e in header.entries}
    assert found == {
        "b": ("F32", (2, 3), tensors["b"].tobytes()),
        "a": ("I64", (), tensors["a"].tobytes()),
    }
    assert header.metadata == {"format": "pt"}
    assert header.file_size == len(raw)


def test_a_written_header_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    specs = [TensorSpec("x", "BF16", (3, 5)), TensorSpec("y", "F8_E4M3", (7,))]
    (tmp_path / SHARD).write_bytes(encode_header(specs, {"k": "v"}) + bytes(37))
    header = read_header(LocalStorage(tmp_path), SHARD)
    assert [(e.name, e.dtype, e.shape) for e in header.entries] == [tuple(s) for s in specs]
    with safetensors.safe_open(tmp_path / SHARD, "pt") as file:
        assert sorted(file.keys()) == ["x", "y"]
        assert file.metadata() == {"k": "v"}
    assert header.data_start % 8 == 0


def test_every_dtype_is_read_with_its_width(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        header = read_entries(tmp_path, bits, x=entry(0, bits, [8], dtype))
        assert header.entries[0].dtype == dtype


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(HeaderError, match=f"the file has {size} bytes"):
        read_bytes(tmp_path, bytes(size))


@pytest.mark.parametrize("length", [2**62, 2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_an_absurd_length_is_refused_at_once(tmp_path: Path, length: int) -> None:
    tracemalloc.start()
    begin = time.thread_time()
    with pytest.raises(HeaderError, match="expected at most 100,000,000"):
        read_bytes(tmp_path, length.to_bytes(8, "little") + b"{}")
    assert time.thread_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="header length 90,000, but the file has 10 bytes"):
        read_bytes(tmp_path, (90_000).to_bytes(8, "little") + b"{}")


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "begins with b''"),
        (b"[]", "begins with b'\\['"),
        (b" {}", "begins with b' '"),
        (b"\x80\x04K\x01.", "begins with"),
        (b'{"a"', "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"\xff": 1}', "not UTF-8 at byte 10"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN in the header"),
        (b'{"a": {"dtype": "U8", "shape": [-Infinity], "data_offsets": [0, 0]}}', "Infinity"),
        (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [-0, 0]}}', "-0 in the header"),
        (b'{"a": 1}', "a: entry is a int"),
        (b'{"a": []}', "a: entry is a list"),
        (b'{"a": {}}', "a: dtype None"),
        (b'{"\\ud800": {}}', "not valid Unicode"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_header_that_is_no_list_of_tensors_is_refused(
    tmp_path: Path, text: bytes, message: str
) -> None:
    with pytest.raises(HeaderError, match=message):
        read_bytes(tmp_path, framed(text))


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4))
    with pytest.raises(HeaderError, match="'x' appears twice"):
        read_bytes(tmp_path, framed(f'{{"x": {one}, "x": {one}}}'.encode()) + bytes(4))


def test_a_repeated_name_among_many_is_found_without_a_hang(tmp_path: Path) -> None:
    value = json.dumps(entry(0, 0))
    text = ",".join(f'"{number}":{value}' for number in [*range(100_000), 99_999])
    begin = time.thread_time()
    with pytest.raises(HeaderError, match="'99999' appears twice"):
        read_bytes(tmp_path, framed(f"{{{text}}}".encode()))
    assert time.thread_time() - begin < 10


def test_a_field_that_appears_twice_is_refused(tmp_path: Path) -> None:
    text = b'{"x": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}'
    with pytest.raises(HeaderError, match="'dtype' appears twice"):
        read_bytes(tmp_path, framed(text) + bytes(4))


def test_a_name_may_hold_what_is_no_size(tmp_path: Path) -> None:
    text = b'{"x: -0, [-0]": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    assert [e.name for e in read_bytes(tmp_path, framed(text)).entries] == ["x: -0, [-0]"]


@pytest.mark.parametrize("dtype", ["F9", "u8", "", None, 8, ["U8"], {"U8": 1}])
def test_an_unknown_dtype_is_refused(tmp_path: Path, dtype: object) -> None:
    with pytest.raises(HeaderError, match=r"x: dtype .* expected one of BOOL, U8"):
        read_entries(tmp_path, 4, x=entry(0, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [None, 4, "four", [-1], [True], [1.0], ["4"], [[4]], [2**63], {}])
def test_a_shape_that_is_no_list_of_sizes_is_refused(tmp_path: Path, shape: object) -> None:
    value = {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}
    with pytest.raises(HeaderError, match="x: shape"):
        read_entries(tmp_path, 4, x=value)


@pytest.mark.parametrize("offsets", [None, 4, [0], [0, 4, 4], [-1, 3], [0.0, 4], [True, 1], "04"])
def test_offsets_that_are_not_two_sizes_are_refused(tmp_path: Path, offsets: object) -> None:
    value = {"dtype": "U8", "shape": [4], "data_offsets": offsets}
    with pytest.raises(HeaderError, match="x: data_offsets"):
        read_entries(tmp_path, 4, x=value)


def test_offsets_that_run_backwards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="run backwards"):
        read_entries(tmp_path, 4, x=entry(4, 0, [4]))


def test_a_shape_whose_product_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="overflows 2\\^63 elements"):
        read_entries(tmp_path, 4, x=entry(0, 4, [2**32, 2**32]))
    with pytest.raises(HeaderError, match="overflows 2\\^63 elements"):
        read_entries(tmp_path, 4, x=entry(0, 4, [2**31] * 60))


def test_more_dimensions_than_torch_has_are_refused(tmp_path: Path) -> None:
    assert read_entries(tmp_path, 1, x=entry(0, 1, [1] * 64)).entries[0].numel == 1
    with pytest.raises(HeaderError, match="65 dimensions, expected at most 64"):
        read_entries(tmp_path, 1, x=entry(0, 1, [1] * 65))


def test_a_message_stays_short_however_long_the_name(tmp_path: Path) -> None:
    with pytest.raises(HeaderError) as raised:
        read_entries(tmp_path, 0, **{"x" * 1_000_000: {}})
    assert len(str(raised.value)) < 700
    assert "dtype None, expected one of" in str(raised.value)


def test_a_shape_with_a_zero_is_empty_whatever_else_it_says(tmp_path: Path) -> None:
    header = read_entries(tmp_path, 0, x=entry(0, 0, [2**62, 2**62, 0]))
    assert header.entries[0].nbytes == 0


def test_a_shape_that_takes_other_bytes_than_its_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"BF16 of shape \[3\] takes 6 bytes, .* give 4"):
        read_entries(tmp_path, 4, x=entry(0, 4, [3], "BF16"))


def test_half_a_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"F4 of shape \[3\] does not end on a byte"):
        read_entries(tmp_path, 2, x=entry(0, 2, [3], "F4"))


def test_a_truncated_file_names_the_tensor_that_is_cut(tmp_path: Path) -> None:
    with pytest.raises(
        HeaderError, match="y: its bytes end at 8 of the data, but the file holds 6"
    ):
        read_entries(tmp_path, 6, x=entry(0, 4), y=entry(4, 8))


def test_overlap_hole_and_trailing_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"y: begins at byte .*, inside x .*: overlap"):
        read_entries(tmp_path, 7, x=entry(0, 4), y=entry(3, 7))
    with pytest.raises(HeaderError, match=r"y: begins at .* a hole of 1 bytes"):
        read_entries(tmp_path, 9, x=entry(0, 4), y=entry(5, 9))
    with pytest.raises(HeaderError, match=r"x: begins at .* but the header ends"):
        read_entries(tmp_path, 5, x=entry(1, 5))
    with pytest.raises(HeaderError, match="3 bytes belong to no tensor"):
        read_entries(tmp_path, 7, x=entry(0, 4))


def test_a_header_need_not_list_tensors_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = read_entries(tmp_path, 8, y=entry(4, 8), x=entry(0, 4), z=entry(4, 4))
    assert [e.name for e in header.entries] == ["x", "z", "y"]


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"1,", b'"",'])
def test_a_large_header_that_lists_no_tensors_is_refused_before_it_is_parsed(
    tmp_path: Path, filler: bytes
) -> None:
    tracemalloc.start()
    with pytest.raises(HeaderError, match="commas in a header of"):
        read_bytes(tmp_path, framed(b'{"a":[' + filler * 6_000_000 + b"1]}"))
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_header_or_a_header_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "bytes"
    directory.mkdir(exist_ok=True)
    for text in (raw, framed(raw), framed(b"{" + raw + b"}")):
        try:
            header = read_bytes(directory, text)
        except HeaderError:
            continue
        assert header.data_start + sum(e.nbytes for e in header.entries) == len(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**64) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "BF16", "F4"]) | json_values,
                "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | json_values,
            }
        ),
        max_size=3,
    )
)
def test_no_json_makes_anything_but_a_header_or_a_header_error(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, object]
) -> None:
    directory = tmp_path_factory.getbasetemp() / "json"
    directory.mkdir(exist_ok=True)
    try:
        header = read_bytes(directory, frame_header(document) + bytes(10))
    except HeaderError:
        return
    assert sum(e.nbytes for e in header.entries) == 10
