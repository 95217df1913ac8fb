# SPDX-License-Identifier: Apache-2.0
"""What each operation of a compiled program costs: products, bytes of memory, bytes of network.

A step takes at least the sum over its operations of the largest of: its products at the device's
peak, as large as its tiles make them; its operands and results at the bandwidth of memory; what it
receives at that of the network. Within a fusion nothing goes through memory. Caches, launches and
what overlaps with what are not known here.
"""

import functools
import math
import re
from typing import NamedTuple

from di_star_jax.cost import hlo, origin, products
from di_star_jax.cost.chips import Chip
from di_star_jax.cost.hlo import Array, Computation, Instruction, Program

COLLECTIVES = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}
# They name memory and touch none; a loop's and a call's cost is that of what they run.
_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "domain",
    "get-dimension-size",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "recv",
    "replica-id",
    "tuple",
}
ARGUMENT = "(of an argument)"
_FAR = 100  # instructions that are asked where one comes from
_FREE_CALLS = {"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


class Op(NamedTuple):
    """An instruction that runs, and what one run costs.

    kind: "matmul", "convolution", "attention", a collective's, or its opcode. times: that it runs
    in a call of the program. flop: of its products; padded: with the zeros that fill the tiles.
    bytes: of main memory; received: bytes of network. place: source line, or XLA's name; module:
    see `origin`. devices: of a collective's group.
    """

    kind: str
    times: float
    flop: float
    padded: float
    bytes: float
    received: float
    place: str
    module: str
    devices: int = 1

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Least seconds of all its runs by what bounds it.

        What each device has for each other one goes through those between them.
        """
        links = chip.links(self.devices) if self.kind == "all-to-all" else 1.0
        return {
            "compute": self.times * self.padded / chip.flops,
            "bytes": self.times * self.bytes / chip.bandwidth,
            "network": self.times * self.received * links / chip.network,
        }


def of_program(program: Program) -> tuple[list[Op], int]:
    """All that runs, and how many loops whose turns are not known are counted as one turn."""
    counter = _Counter(program)
    return counter.ops(program.entry), len(counter.endless)


class _Counter:
    """Counts a program, each computation once. endless: loops whose turns are not known."""

    def __init__(self, program: Program):
        self.program = program
        self.endless: set[str] = set()
        self.ops = functools.cache(self._ops)
        self.products = functools.cache(self._products)
        self.needs = functools.cache(self._needs)

    def _ops(self, name: str) -> list[Op]:
        scope = self.program.computations[name]
        found: list[Op] = []
        running: dict[str, list[int]] = {}  # what a TPU receives bit by bit: places in `found`
        for one in scope.instructions.values():
            channel, turn = self._turn(one)
            if turn == "start":
                running[channel] = []
            if channel in running:
                running[channel].append(len(found))
            is_between = channel in running and not turn
            found += [self._op(one, scope, "")] if is_between else self._of(one, scope)
            if turn == "done" and channel in running:
                _share_out(running.pop(channel), found)
        return found

    def _turn(self, one: Instruction) -> tuple[str, str]:
        """(channel, "start", "done" or "") of a fusion that receives; of all else ("", "").

        A TPU begins to gather in one fusion, goes on with it in others, which compute besides, and
        ends it in a last one.
        """
        if one.opcode != "fusion":
            return "", ""
        receiver = self._receiver(one)
        if receiver is one:
            return "", ""
        inside = self.program.computations[hlo.called(one)["calls"][0]].instructions.values()
        targets = {hlo.attribute(each, "custom_call_target") for each in inside}
        turns = {"AsyncCollectiveStart": "start", "AsyncCollectiveDone": "done"}
        turn = next((turns[target] for target in targets & set(turns)), "")
        return hlo.attribute(receiver, "channel_id"), turn

    def _of(self, one: Instruction, scope: Computation) -> list[Op]:
        """Of an instruction and what it calls."""
        calls = hlo.called(one) if one.opcode in _CALLERS else {}
        if one.opcode == "while":
            turns = hlo.trips(self.program, one, scope)
            if turns is None:
                self.endless.add(one.name)
            inside = [*self.ops(calls["body"][0]), *self.ops(calls["condition"][0])]
            turns = 1 if turns is None else turns
            return [op._replace(times=op.times * turns) for op in inside]
        if one.opcode == "conditional":
            branches = [self.ops(name) for names in calls.values() for name in names]
            return max(branches, key=weight)
        if one.opcode in _CALLERS:
            return [op for names in calls.values() for name in names for op in self.ops(name)]
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return []
        target = hlo.attribute(one, "custom_call_target")
        return [] if target in _FREE_CALLS else [self._op(one, scope, self._collective(one))]

    def _op(
        self,
        one: Instruction,
        scope: Computation,
        collective: str,
    ) -> Op:
        """Args: collective, a key of COLLECTIVES, or ""."""
        found = self._products_of(one, scope)
        largest = max(found, key=lambda each: each[1].flop, default=None)
        name, stack = self._origin(one, scope, largest[0] if largest else None)
        op = Op(
            largest[1].kind if largest else one.opcode.removesuffix("-start"),
            1.0,
            sum(product.flop for _, product in found),
            sum(product.padded for _, product in found),
            self._bytes(one, scope),
            0.0,
            origin.place(name, stack),
            origin.module(stack),
        )
        if not collective:
            return op
        return op._replace(
            kind=COLLECTIVES[collective],
            received=self._received(one, collective),
            module=origin.COLLECTIVES,
            devices=self._members(one),
        )

    # Products

    def _products_of(
        self,
        one: Instruction,
        scope: Computation,
    ) -> list[tuple[Instruction, products.Product]]:
        if one.opcode == "fusion":
            return [each for name in hlo.called(one)["calls"] for each in self.products(name)]
        if one.opcode not in ("dot", "convolution", "custom-call"):
            return []
        found = products.of(one, [scope.instructions[name].result[0] for name in one.operands])
        return [(one, found)] if found else []

    def _products(self, name: str) -> list[tuple[Instruction, products.Product]]:
        """Of all in a fused computation."""
        scope = self.program.computations[name]
        return [
            each for one in scope.instructions.values() for each in self._products_of(one, scope)
        ]

    # Memory

    def _bytes(self, one: Instruction, scope: Computation) -> float:
        operands = [scope.instructions[name].result for name in one.operands]
        results = _outputs(one)
        if one.opcode == "fusion":
            reads, writes = self.needs(hlo.called(one)["calls"][0])
            read = sum(share * _total(arrays) for share, arrays in zip(reads, operands))
            return read + sum(share * array.bytes for share, array in zip(writes, results))
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            read = _share(results[0], operands[0][0]) * _total(operands[0])
            return read + sum(map(_total, operands[1:])) + _total(results)
        if one.opcode == "dynamic-update-slice":
            share = _share(operands[1][0], results[0])
            return _total(operands[1]) + share * _total(results)
        if one.opcode == "scatter":  # in place: reads what it adds to
            arrays = (len(operands) - 1) // 2
            updates = sum(map(_total, operands[-arrays:]))
            return 3 * updates + _total(operands[arrays])
        return sum(map(_total, operands)) + _total(results)

    def _needs(self, name: str) -> tuple[list[float], list[float]]:
        """The shares of its parameters that a fused computation reads, and of its results that it
        writes.

        Slices read what they cut out, and so does what is computed for them alone; updates of a
        slice in place write that slice.
        """
        instructions, root = self.program.computations[name]
        results = [instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
        updates = [_update_in_place(result, instructions) for result in results]
        writes = [
            _share(instructions[update.operands[1]].result[0], update.result[0]) if update else 1.0
            for update in updates
        ]
        in_place = {update.name for update in updates if update}
        needed = {one.name: float(one.result[0].size) for one in results if one.result}
        if any(one.opcode == "parameter" for one in results):  # hands on what is being received
            handed_on = {one.name for one in results if one.opcode in ("parameter", *COLLECTIVES)}
            writes = [0.0 if one.name in handed_on else w for one, w in zip(results, writes)]
            needed = {name: size for name, size in needed.items() if name not in handed_on}
        for one in reversed(instructions.values()):
            if one.name in needed:
                shares = self._shares(one, instructions, needed[one.name], one.name in in_place)
                for operand, elements in zip(one.operands, shares):
                    size = _size(instructions[operand])
                    needed[operand] = min(needed.get(operand, 0.0) + elements, size)
        parameters = [one for one in instructions.values() if one.opcode == "parameter"]
        parameters.sort(key=lambda one: int(one.operands[0]))
        reads = [needed.get(one.name, 0.0) / max(_size(one), 1) for one in parameters]
        return reads, writes

    def _shares(
        self,
        one: Instruction,
        instructions: dict[str, Instruction],
        elements: float,
        is_in_place: bool,
    ) -> list[float]:
        """Elements of each operand that so many elements of the result need."""
        if one.opcode in ("parameter", "constant"):
            return []
        sizes = [_size(instructions[name]) for name in one.operands]
        share = elements / max(_size(one), 1)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return [elements, *sizes[1:]]
        if one.opcode == "dynamic-update-slice":
            return [0.0 if is_in_place else elements, *sizes[1:]]
        if one.opcode == "fusion":
            reads, _ = self.needs(hlo.called(one)["calls"][0])
            return [min(share, 1.0) * read * size for read, size in zip(reads, sizes)]
        if one.opcode in ("reduce", "concatenate", "pad"):
            return [share * size for size in sizes]
        if one.opcode in ("dot", "convolution", "custom-call", "tuple", "get-tuple-element"):
            return list(sizes)
        return [min(size, elements) for size in sizes]

    # Network

    def _collective(self, one: Instruction) -> str:
        """The key of COLLECTIVES of what an instruction is or has fused; "" for none."""
        opcode = one.opcode.removesuffix("-start")
        if opcode != "fusion":
            return opcode if opcode in COLLECTIVES else ""
        inside = self.program.computations[hlo.called(one)["calls"][0]].instructions.values()
        found = [each.opcode for each in inside if each.opcode in COLLECTIVES]
        # A TPU's all-reduce of which each keeps a slice.
        is_scatter = found == ["all-reduce"] and _total(one.result) < _total(
            next(each for each in inside if each.opcode == "all-reduce").result
        )
        return "reduce-scatter" if is_scatter else (found[0] if found else "")

    def _received(self, one: Instruction, collective: str) -> float:
        """Bytes that a device receives."""
        n = self._members(one)
        if n < 2:
            return 0.0
        # What a fusion gives may be more than what it receives, or a part of it.
        receiver = one if collective == "reduce-scatter" else self._receiver(one)
        results = _all(_outputs(receiver))
        factors = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return factors.get(collective, (n - 1) / n) * results

    def _receiver(self, one: Instruction) -> Instruction:
        """The collective that a fusion holds; all else, itself."""
        if one.opcode != "fusion":
            return one
        inside = self.program.computations[hlo.called(one)["calls"][0]].instructions.values()
        return next((each for each in inside if each.opcode in COLLECTIVES), one)

    def _members(self, one: Instruction) -> int:
        """Of a collective's group."""
        one = self._receiver(one)
        if "source_target_pairs=" in one.attributes:
            return 2
        found = re.search(r"replica_groups=\{\{([\d,]+)\}", one.attributes)
        if found:
            return found[1].count(",") + 1
        found = re.search(r"replica_groups=\[\d+,(\d+)\]", one.attributes)
        if found:
            return int(found[1])
        found = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", one.attributes)
        if not found:
            return self.program.devices
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))

    # Origin

    def _origin(
        self,
        one: Instruction,
        scope: Computation,
        product: Instruction | None,
    ) -> tuple[str, list[hlo.Frame]]:
        """op_name and stack of what says where it comes from: its product, itself, what it has
        fused, or what made its first operand.
        """
        candidates = [each for each in (product, one) if each]
        if one.opcode == "fusion":
            inside = self.program.computations[hlo.called(one)["calls"][0]]
            candidates += [inside.root, *reversed(inside.instructions.values())]
        maker = one
        while maker.opcode != "parameter" and maker.operands and len(candidates) < _FAR:
            maker = scope.instructions.get(maker.operands[0], maker)
            candidates.append(maker)
        for each in candidates:
            frame = re.search(r"stack_frame_id=(\d+)", each.attributes)
            if frame:
                stack = list(self.program.stack(int(frame[1])))
                return hlo.attribute(each, "op_name"), stack
        names = (hlo.attribute(each, "op_name") for each in candidates if each is not maker)
        return next(filter(None, names), ARGUMENT if maker.opcode == "parameter" else ""), []


_CALLERS = {"while", "conditional", "call", "async-start"}


def weight(ops: list[Op]) -> float:
    """By which a conditional's branches compare: as of a device that moves a byte in 200 FLOP."""
    return sum(op.times * max(op.padded, 200 * op.bytes) for op in ops)


def _share_out(places: list[int], found: list[Op]) -> None:
    """Has what runs while something is received receive it, each by its weight.

    Args: places, in `found`, of what begins, what runs meanwhile, and what ends.
    """
    first, *between, last = places
    received = found[first].received
    whole = weight([found[place] for place in between])
    for place in (first, last):
        found[place] = found[place]._replace(received=0.0 if whole else received / 2)
    for place in between:
        share = weight([found[place]]) / whole if whole else 0.0
        found[place] = found[place]._replace(received=share * received)


def _size(one: Instruction) -> int:
    return sum(array.size for array in one.result)


def _total(arrays: tuple[Array, ...]) -> float:
    """Bytes of main memory."""
    return sum(array.bytes for array in arrays)


def _all(arrays: tuple[Array, ...]) -> float:
    """Bytes without padding, wherever they lie."""
    return sum(array.size * array.bits / 8 for array in arrays)


def _share(part: Array, whole: Array) -> float:
    """Of a whole's elements, at most 1."""
    return min(part.size / whole.size, 1.0) if whole.size else 0.0


def _outputs(one: Instruction) -> tuple[Array, ...]:
    """What it writes: no operands that a start hands on, and no workspace."""
    if one.opcode == "copy-start":
        return one.result[:1]
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        count = len(one.operands)
        return one.result[count : 2 * count]
    if one.opcode == "custom-call" and len(one.result) > 1:
        return tuple(each for each in one.result if each.dtype not in ("u8", "s8"))
    return one.result


def _update_in_place(
    result: Instruction,
    instructions: dict[str, Instruction],
) -> Instruction | None:
    """The update of a slice that a result is, where what it updates is a parameter."""
    update = _through(result, instructions)
    if update.opcode != "dynamic-update-slice":
        return None
    updated = _through(instructions[update.operands[0]], instructions)
    return update if updated.opcode == "parameter" else None


def _through(one: Instruction, instructions: dict[str, Instruction]) -> Instruction:
    while one.opcode == "bitcast":
        one = instructions[one.operands[0]]
    return one
