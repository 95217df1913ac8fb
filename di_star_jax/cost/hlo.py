# SPDX-License-Identifier: Apache-2.0
"""A compiled program's text (`jax.stages.Compiled.as_text()`) as computations and instructions.

Only what its cost needs is read; attributes stay text until somebody asks. Source of the syntax:
XLA's `hlo_parser.h` and "Tiled layout" in its documentation.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
    """An array's shape and its place in memory.

    bits: of an element. order: axes, the one whose elements are neighbours first. tile: extents
    that the last axes of `order`, reversed, are padded to; () for none. space: 0 is the device's
    main memory, others are on chip, or the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    bits: int
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def padded(self) -> tuple[int, ...]:
        """Dims as the tiles have them."""
        dims = list(self.dims)
        for axis, extent in zip(self.order, reversed(self.tile)):
            dims[axis] = -(-dims[axis] // extent) * extent
        return tuple(dims)

    @property
    def bytes(self) -> float:
        """Of main memory, with the tiles' padding."""
        return math.prod(self.padded) * self.bits / 8 if self.space == 0 else 0.0


class Instruction(NamedTuple):
    """A line. result: an array, or a tuple's arrays, flat. operands: names in its computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """instructions: by name, operands before those that use them."""

    instructions: dict[str, Instruction]
    root: Instruction


class Frame(NamedTuple):
    """A place in the source."""

    file: str
    function: str
    line: int


class Program(NamedTuple):
    """entry: of computations. devices: that it runs on. frames: (frame, parent) by number."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    frames: dict[int, tuple[Frame, int]]

    def stack(self, number: int) -> Iterator[Frame]:
        """Of a frame, the innermost first."""
        while number in self.frames:
            frame, parent = self.frames[number]
            yield frame
            if parent >= number:
                return
            number = parent


_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_START = re.compile(r"\s+(ROOT )?%[\w.\-]+ = ")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:%([\w.\-]+)|\{([^}]*)\})"
)


def parse(text: str) -> Program:
    """Args: text, of an optimised program whose operands are names alone."""
    lines = iter(text.splitlines())
    header = next(lines)
    tables: dict[str, dict[int, str]] = {}
    computations: dict[str, Computation] = {}
    entry = ""
    rows: dict[int, str] | None = None  # of the table that is being read
    for line in lines:
        head = _HEAD.fullmatch(line)
        if head:
            rows = None
            computations[head[2]] = _computation(lines)
            entry = head[2] if head[1] else entry
        elif line.isidentifier():
            rows = tables.setdefault(line, {})
        elif rows is not None and line:
            number, row = line.split(" ", 1)
            rows[int(number)] = row
    return Program(computations, entry, _devices(header), _frames(tables))


def _computation(lines: Iterator[str]) -> Computation:
    """Reads as far as its closing brace."""
    rows: list[str] = []
    for line in lines:
        if line == "}" or line.startswith("}, execution_thread="):
            break
        if _START.match(line):
            rows.append(line)
        elif rows:  # a kernel's own attributes have line breaks
            rows[-1] += line
    instructions = {}
    root = None
    for row in rows:
        is_root, name, shape, opcode, inside, attributes = _LINE.fullmatch(row).groups()
        operands = inside if opcode in ("parameter", "constant") else _NAME.findall(inside)
        operands = (inside,) if isinstance(operands, str) else tuple(operands)
        instructions[name] = Instruction(name, opcode, arrays(shape), operands, attributes)
        root = instructions[name] if is_root else root
    return Computation(instructions, root)


def _devices(header: str) -> int:
    found = (re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count"))
    return math.prod(int(match[1]) for match in found if match)


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[Frame, int]]:
    files = {number: row.strip('"') for number, row in tables.get("FileNames", {}).items()}
    functions = {number: row.strip('"') for number, row in tables.get("FunctionNames", {}).items()}
    places = {}
    for number, row in tables.get("FileLocations", {}).items():
        place = _numbers(row)
        file, function = files[place["file_name_id"]], functions[place["function_name_id"]]
        places[number] = Frame(file, function, place["line"])
    rows = {number: _numbers(row) for number, row in tables.get("StackFrames", {}).items()}
    # A root's parent is 0, but is printed as 1, and all others one too large with it.
    first = rows.get(1, {}).get("parent_frame_id", 0)
    return {
        number: (places[row["file_location_id"]], row.get("parent_frame_id", 0) - first)
        for number, row in rows.items()
    }


def _numbers(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)", row)}


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
    """Of a shape's text, a tuple's flat."""
    return tuple(_array(*found.groups()) for found in _ARRAY.finditer(shape))


def _array(
    dtype: str,
    dims: str,
    layout: str | None,
) -> Array:
    order, _, rest = (layout or "").partition(":")
    tile = re.search(r"T\(([^)]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        _integers(dims),
        _bits(dtype),
        _integers(order),
        _integers(tile[1]) if tile else (),
        int(space[1]) if space else 0,
    )


def _bits(dtype: str) -> int:
    """Of an element; 0 for a token."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def _integers(text: str) -> tuple[int, ...]:
    """Of a list with commas; a bound, as "<=8", is its number."""
    return tuple(int(found) for found in re.findall(r"\d+", text))


def called(instruction: Instruction) -> dict[str, list[str]]:
    """Names of computations by the attribute that calls them."""
    return {
        key: [one] if one else _NAME.findall(several)
        for key, one, several in _CALLED.findall(instruction.attributes)
    }


def attribute(instruction: Instruction, key: str) -> str:
    """What is in an attribute's braces or quotes, or the word it is; "" where it is not there."""
    found = re.search(rf'\b{key}=(?:\{{([^}}]*)\}}|"([^"]*)"|([^\s,]+))', instruction.attributes)
    return next((part for part in found.groups() if part is not None), "") if found else ""


def integers(instruction: Instruction, key: str) -> tuple[int, ...]:
    """An attribute that is a list of numbers."""
    return _integers(attribute(instruction, key))


class Axis(NamedTuple):
    """How a convolution's window moves along an axis."""

    size: int = 1
    stride: int = 1
    pad: tuple[int, int] = (0, 0)
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def window(instruction: Instruction) -> list[Axis]:
    """By axis; [] where none is given."""
    fields = dict(re.findall(r"(\w+)=(\S+)", attribute(instruction, "window")))
    columns = {key: value.split("x") for key, value in fields.items()}
    axes = []
    for i in range(len(columns.get("size", []))):
        numbers = {key: values[i] for key, values in columns.items() if key in Axis._fields}
        pad = numbers.pop("pad", "0_0").split("_")
        whole = {key: int(value) for key, value in numbers.items()}
        axes.append(Axis(**whole, pad=(int(pad[0]), int(pad[1]))))
    return axes


def trips(program: Program, instruction: Instruction, scope: Computation) -> int | None:
    """How often a while loop's body runs; None where its text does not say.

    XLA for TPUs leaves its own note out: then of a counter that starts at a constant and grows by
    one until it reaches another. Args: scope, which it stands in.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if noted:
        return int(noted[1])
    calls = called(instruction)
    condition = program.computations[calls["condition"][0]]
    root = condition.root
    if root.opcode == "fusion" and len(root.operands) == 2:
        compared = program.computations[called(root)["calls"][0]].root
    else:
        compared = root
    if attribute(compared, "direction") != "LT":
        return None
    counter, limit = (condition.instructions.get(name) for name in root.operands)
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    start = _start(counter, instruction, scope)
    end = _constant(limit, condition)
    if end is None and limit.opcode == "get-tuple-element":
        end = _start(limit, instruction, scope)
    return None if start is None or end is None else max(end - start, 0)


def _start(
    element: Instruction,
    loop: Instruction,
    scope: Computation,
) -> int | None:
    """The number that a loop's element has before the first turn."""
    initial = scope.instructions[loop.operands[0]]
    if initial.opcode != "tuple":
        return None
    name = initial.operands[integers(element, "index")[0]]
    return _constant(scope.instructions[name], scope)


def _constant(instruction: Instruction, scope: Computation) -> int | None:
    """Its number, also by way of a copy."""
    while instruction.opcode in ("copy", "bitcast"):
        instruction = scope.instructions[instruction.operands[0]]
    whole = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0])
    return int(instruction.operands[0]) if whole else None
