"""An ONNX file is read without onnx: no tensor that it wants from elsewhere is missed, and damaged bytes are an error in words."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.artifacts.graphs import MESSAGES, Graph, OutsideTensor, Value, read_graph
from edgetune.errors import ArtifactsError


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """One field as protobuf writes it."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str = "weight", location: str = "elsewhere.bin") -> bytes:
    """A tensor (2, 3) of float32 whose bytes are in another file."""
    entry = field(13, field(1, "location") + field(2, location))
    return field(1, 2) + field(1, 3) + field(2, 1) + field(8, name) + entry + field(14, 1)


def value(name: str) -> bytes:
    sides = field(1, field(2, "batch")) + field(1, field(1, 7))
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, sides)))


OUTPUT = field(12, value("logits"))
WEIGHT = OutsideTensor("weight", 1, (2, 3), (("location", "elsewhere.bin"),))
GRAPH = field(7, field(11, value("images")) + field(5, tensor()) + OUTPUT)


def read(path: Path, data: bytes) -> Graph:
    path.write_bytes(data)
    return read_graph(path)


def test_inputs_outputs_and_what_is_elsewhere_come_out(tmp_path: Path) -> None:
    sides = ("batch", 7)
    assert read(tmp_path / "graph", GRAPH) == Graph(
        (Value("images", 1, sides),), (Value("logits", 1, sides),), (WEIGHT,)
    )


def test_sides_that_lie_packed_are_read_too(tmp_path: Path) -> None:
    packed = field(1, b"\x02\x03") + field(2, 1) + field(8, "weight") + field(13, b"")
    (found,) = read(tmp_path / "graph", field(7, field(5, packed) + OUTPUT)).outside
    assert found == OutsideTensor("weight", 1, (2, 3), (("", ""),))


@pytest.mark.parametrize(
    "data",
    [
        field(7, field(15, field(1, tensor()))),  # a sparse initializer's values
        field(7, field(15, field(2, tensor()))),  # its places
        field(7, field(1, field(5, field(5, tensor())))),  # a node's attribute
        field(7, field(1, field(5, field(10, tensor())))),  # one of several
        field(7, field(1, field(5, field(6, field(5, tensor()))))),  # an initializer of a branch
        field(7, field(1, field(5, field(11, field(1, field(5, field(5, tensor()))))))),  # deeper
        field(7, field(1, field(5, field(22, field(1, tensor()))))),
        field(7, field(1, field(5, field(23, field(2, tensor()))))),
        field(25, field(7, field(5, field(5, tensor())))),  # a function of the model
        field(25, field(11, field(5, tensor()))),
        field(20, field(1, field(5, tensor()))),  # training information
        field(20, field(2, field(1, field(5, field(5, tensor()))))),
        field(7, field(5, tensor())) + field(7, b""),  # a graph in two parts
    ],
)
def test_a_tensor_is_found_wherever_a_model_may_hold_one(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path / "graph", field(7, OUTPUT) + data).outside == (WEIGHT,)


def test_the_messages_are_those_of_onnx_that_can_hold_a_tensor() -> None:
    onnx = pytest.importorskip("onnx", reason="its description of the format")

    def holds_tensor(kind: Any, seen: tuple[str, ...] = ()) -> bool:
        if kind.name == "TensorProto":
            return True
        inner = [each.message_type for each in kind.fields if each.message_type and each.message_type.name not in seen]
        return any(holds_tensor(each, (*seen, kind.name)) for each in inner)

    kinds = {
        "model": onnx.ModelProto, "training": onnx.TrainingInfoProto, "function": onnx.FunctionProto, "graph": onnx.GraphProto,
        "inner": onnx.GraphProto, "node": onnx.NodeProto, "attribute": onnx.AttributeProto, "sparse": onnx.SparseTensorProto,
    }  # fmt: skip
    names = {"GraphProto": "inner", "TensorProto": "tensor", "SparseTensorProto": "sparse"}
    names |= {each.DESCRIPTOR.name: name for name, each in kinds.items() if name not in ("graph", "inner", "sparse")}
    for name, kind in kinds.items():
        wanted = {
            each.number: names[each.message_type.name]
            for each in kind.DESCRIPTOR.fields
            if each.message_type and holds_tensor(each.message_type)
        }
        known = {number: {"graph": "inner"}.get(to, to) for number, to in MESSAGES[name].items()}
        assert {number: to for number, to in known.items() if to not in ("input", "output")} == wanted
    numbers = {each.name: each.number for each in onnx.TensorProto.DESCRIPTOR.fields}
    assert [numbers[each] for each in ("dims", "data_type", "name", "external_data", "data_location")] == [
        1,
        2,
        8,
        13,
        14,
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it gives nothing"),
        (b"hello world" * 10, "no known kind"),
        (b"\x18\0\0\0ORTM" + bytes(100), "without a number"),  # the runtime's own format
        (GRAPH[:-1], "cut short"),
        (field(7, field(12, b"\x0a\xff")), "cut short"),
        (varint(7 << 3 | 2) + varint(2**40), "cut short"),
        (varint(7 << 3 | 3) + GRAPH, "no known kind"),
        (b"\xff" * 20, "more than ten bytes"),
        (field(7, field(12, field(1, "n" * 5000))), "longer than any"),
        (field(7, field(5, field(1, b"\x01" * 100))), "more parts"),
    ],
)
def test_what_is_no_graph_is_refused_in_words(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ArtifactsError, match=rf"graph is no ONNX graph: .*{words}.*Export it again"):
        read(tmp_path / "graph", data)


def test_graphs_in_graphs_without_end_are_refused(tmp_path: Path) -> None:
    deep = b""
    for _ in range(40):
        deep = field(1, field(5, field(6, deep)))
    with pytest.raises(ArtifactsError, match="too deep"):
        read(tmp_path / "graph", field(7, deep))


def test_many_names_do_not_take_memory_without_end(tmp_path: Path) -> None:
    with pytest.raises(ArtifactsError, match="longer than any"):
        read(tmp_path / "graph", field(7, field(11, field(1, "n" * 4000)) * 3000))
    with pytest.raises(ArtifactsError, match="more parts"):
        read(tmp_path / "graph", field(7, field(11, field(1, "n")) * 11_000))


def test_a_tensor_of_a_gibibyte_is_stepped_over(tmp_path: Path) -> None:
    size = 2**30
    inside = field(1, size) + varint(9 << 3 | 2) + varint(size)
    graph = field(12, value("logits")) + varint(5 << 3 | 2) + varint(len(inside) + size) + inside
    path = tmp_path / "graph"
    with path.open("wb") as file:
        file.write(varint(7 << 3 | 2) + varint(len(graph) + size) + graph)
        file.truncate(file.tell() + size)  # a hole: no byte of it is on the disk
    tracemalloc.start()
    try:
        assert read_graph(path).outside == ()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def either(path: Path, data: bytes) -> None:
    """Bytes are a graph or an error of ours."""
    try:
        assert read(path, data).outputs
    except ArtifactsError as error:
        assert "is no ONNX graph" in str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GRAPH) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(GRAPH)))
def test_damaged_graphs_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], end: int
) -> None:
    data = bytearray(GRAPH)
    for place, byte in changes:
        data[place] = byte
    either(tmp_path_factory.getbasetemp() / "damaged", bytes(data))
    either(tmp_path_factory.getbasetemp() / "damaged", bytes(data[:end]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    either(tmp_path_factory.getbasetemp() / "any", data)
    either(tmp_path_factory.getbasetemp() / "any", field(7, data + OUTPUT))
