"""Broken and hostile safetensors files, as bytes."""

import json
import struct


def file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (an object, or bytes as they are), claimed to be ``length`` long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, dtype: str = "F32", shape: tuple[int, ...] | None = None) -> dict:
    return {"dtype": dtype, "shape": list(shape) if shape is not None else [(stop - start) // 4], "data_offsets": [start, stop]}


FILES = {
    "empty": b"",
    "seven_bytes": b"\0" * 7,
    "header_2_63": file({}, length=2**63),
    "header_2_64": file({}, length=2**64 - 1),
    "header_above_100_mb": file({}, length=100_000_001),
    "header_beyond_end": file({}, length=100),
    "overlap": file({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "same_bytes_twice": file({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8),
    "hole": file({"a": entry(0, 8), "b": entry(12, 16)}, b"\0" * 16),
    "hole_at_start": file({"a": entry(4, 8)}, b"\0" * 8),
    "tail": file({"a": entry(0, 8)}, b"\0" * 9),
    "cut_off": file({"a": entry(0, 8)}, b"\0" * 7),
    "offsets_reversed": file({"a": entry(8, 0, shape=(2,))}, b"\0" * 8),
    "offsets_negative": file({"a": entry(-8, 0, shape=(2,))}, b"\0" * 8),
    "offsets_2_63": file({"a": entry(2**63, 2**63 + 8, shape=(2,))}, b"\0" * 8),
    "three_offsets": file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, b"\0" * 8),
    "wrong_size": file({"a": entry(0, 8, shape=(3,))}, b"\0" * 8),
    "wrong_dtype": file({"a": entry(0, 8, "F31", (2,))}, b"\0" * 8),
    "dtype_is_list": file({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "shape_wraps_to_0": file({"a": entry(0, 0, shape=(2**32, 2**32))}),
    "shape_2_63": file({"a": entry(0, 0, shape=(0, 2**63))}),
    "shape_zero_times_huge": file({"a": entry(0, 0, shape=(0, 2**62, 2**62))}),
    "shape_negative": file({"a": entry(0, 8, shape=(-1, -2))}, b"\0" * 8),
    "shape_bool": file(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"\0" * 4),
    "shape_float": file({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"\0" * 8),
    "shape_1000_axes": file({"a": entry(0, 4, shape=(1,) * 1000)}, b"\0" * 4),
    "number_of_5000_digits": file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"\0" * 4),
    "name_twice": file(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "field_twice": file(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "field_unknown": file({"a": entry(0, 8) | {"x": 1}}, b"\0" * 8),
    "field_missing": file({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "metadata_not_text": file({"__metadata__": {"a": 1}}),
    "metadata_list": file({"__metadata__": ["a"]}),
    "not_a_table": file(b"[]"),
    "not_json": file(b"{"),
    "not_utf8": file(b'{"\xff":1}'),
    "lone_surrogate": file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "leading_blank": file(b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "nested_100000_deep": file(b'{"a":' * 100_000 + b"}" * 100_000),
    "arrays_100000_deep": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}
