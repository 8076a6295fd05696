"""What a compiled program does, read from its text: FLOPs and collectives of one device, each loop body as often as it
runs.

XLA's own cost analysis counts the body of a loop once. Products are `dot`, or `convolution` as TPUs have them; kernels
tell their FLOPs by a cost estimate. A loop runs as often as its condition says, where that compares a counter with a
constant; where the number depends on data, as often as its name says (`rounds_usually_4`, `exchange`).
"""

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # Its type.
    operation: str
    arguments: str
    rest: str  # Attributes.

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program, or a part of it, does on one device."""

    flops: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # Bytes by kind.
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # How often, by kind.
    wire: float = 0.0  # Bytes that a device sends for them, at best.
    unknown: tuple[str, ...] = ()  # Loops with work in them that run nobody knows how often; counted once.

    def times(self, number: float) -> "Work":
        def each(counter):
            return collections.Counter({kind: number * value for kind, value in counter.items()})

        collectives, counts = each(self.collectives), each(self.counts)
        return Work(number * self.flops, collectives, counts, number * self.wire, self.unknown)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.collectives + other.collectives,
            self.counts + other.counts,
            self.wire + other.wire,
            self.unknown + other.unknown,
        )


def work_of(text: str) -> Work:
    """The work of one run of a program on one device, from `Compiled.as_text()`."""
    entry, computations = _parse(text)

    @functools.cache
    def of(name: str) -> Work:
        instructions = computations[name]
        types = {instruction.name: instruction.result for instruction in instructions}
        total = Work()
        # A collective that goes on while other work is done stands in all of that; it counts where it starts.
        goes_on = name.startswith("async_collective_fusion")
        goes_on |= any("AsyncCollectiveDone" in instruction.rest for instruction in instructions)
        for instruction in instructions:
            if not (goes_on and instruction.operation in COLLECTIVES):
                total += _own(instruction, types)
            called = _called(instruction)
            if instruction.operation == "while":
                body = of(called[0])
                times = _trip_count(instruction, computations)
                if times is None:
                    has_work = body.flops or body.collectives
                    total += dataclasses.replace(body, unknown=(*body.unknown, instruction.name) if has_work else ())
                else:
                    total += body.times(times)
            elif instruction.operation == "conditional":
                total += max((of(branch) for branch in called), key=lambda work: work.flops)
            elif instruction.operation in ("fusion", "call", "async-start"):
                for each in called:
                    total += of(each)
        return total

    return of(entry)


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    entry, computations, current = None, {}, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[1], found[2]))
    return entry, computations


def _instruction(name: str, text: str) -> _Instruction:
    # The type may be a tuple in brackets, of any depth.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    result, text = text[: end + 1], text[end + 1 :].lstrip()
    begin = text.index("(")
    end = _closing(text, begin)
    return _Instruction(name, result, text[:begin].strip(), text[begin + 1 : end], text[end + 1 :])


def _closing(text: str, begin: int) -> int:
    depth = 0
    for index in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"no closing bracket: {text[:80]}")


def _called(instruction: _Instruction) -> list[str]:
    found = _CALLED.findall(instruction.rest)
    return [name.strip().lstrip("%") for group in found for name in group.strip("{}").split(",")]


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    # The loop's own name, and not that of one around it.
    if usual := re.search(r'rounds_usually_(\d+)/while"', loop.rest):
        return int(usual[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    constants = {each.name: int(each.arguments) for each in condition if _is_whole_number(each)}
    for each in condition:
        if each.operation == "compare" and "direction=LT" in each.rest:
            limits = [constants[name] for name in each.operands if name in constants]
            return limits[0] if limits else None
        # A fusion of the comparison, of the counter and the constant.
        if each.operation == "fusion" and len(each.operands) == 2:
            limits = [constants[name] for name in each.operands if name in constants]
            if limits:
                return limits[0]
    return None


def _is_whole_number(instruction: _Instruction) -> bool:
    is_scalar = instruction.result.startswith(("s32[]", "u32[]", "s64[]", "u64[]"))
    return is_scalar and instruction.operation == "constant" and instruction.arguments.isdigit()


def _own(instruction: _Instruction, types: dict[str, str]) -> Work:
    """What an instruction does by itself."""
    operation = instruction.operation
    if operation == "convolution":
        return Work(2 * _multiplied_by_convolution(instruction, types))
    if operation == "dot":
        return Work(2 * _elements(instruction.result) * _summed_by_dot(instruction, types))
    if operation == "custom-call" and (flops := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)):
        return Work(float(flops[1]))
    kind = operation.removesuffix("-start")
    if kind in COLLECTIVES:
        given = [_bytes(array) for array in _ARRAY.findall(instruction.result)]
        taken = [sum(_bytes(x) for x in _ARRAY.findall(types.get(name, ""))) for name in instruction.operands]
        if kind == "ragged-all-to-all":
            # From one array into another; one of them is as long as what may move.
            size = min(taken[:2])
        else:
            # The larger side: what a gather gives, what a scatter takes. A start gives both.
            size = max(sum(given) - (sum(taken) if operation.endswith("-start") else 0), sum(taken))
        return Work(
            collectives=collections.Counter({kind: size}),
            counts=collections.Counter({kind: 1}),
            wire=size * _passes(kind, instruction),
        )
    return Work()


def _passes(kind: str, instruction: _Instruction) -> float:
    """How much of a collective's array a device sends, in the best of ways: its own part stays, and a sum is a scatter
    and a gather."""
    if kind.startswith("collective"):
        return 1.0
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", instruction.rest):
        size = listed[1].count(",") + 1
    else:
        counted = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest)
        size = int(counted[1]) if counted else 2
    return (2 if kind == "all-reduce" else 1) * (1 - 1 / size)


def _dims(type_: str) -> list[int]:
    found = _ARRAY.search(type_)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _elements(type_: str) -> int:
    return math.prod(_dims(type_))


def _bytes(array: tuple[str, str]) -> float:
    return _BYTES.get(array[0], 0) * math.prod(int(size) for size in array[1].split(",") if size)


def _multiplied_by_convolution(instruction: _Instruction, types: dict[str, str]) -> int:
    """Products of two elements: of the result's numbers and the input features, at all places of the window that lie on
    the input. TPUs have batches of products as windows of which all but one element is padding, or a hole.
    """
    labels_in, labels_kernel, labels_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    inputs, kernel = (_dims(types[name]) for name in instruction.operands[:2])
    result = _dims(instruction.result)
    products = kernel[labels_kernel.index("i")] * result[labels_out.index("b")] * result[labels_out.index("f")]
    for dim, window in enumerate(_windows(instruction.rest)):
        products *= window.num_on_input(inputs[labels_in.index(str(dim))], result[labels_out.index(str(dim))])
    return products


@dataclasses.dataclass(frozen=True)
class _Window:
    """Of one spatial dimension of a convolution."""

    size: int
    stride: int = 1
    pad: int = 0  # Before the first element.
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def num_on_input(self, size_in: int, size_out: int) -> int:
        """How many elements of the window lie on the input, over all its places."""
        on_input = range(0, size_in * self.lhs_dilate, self.lhs_dilate)
        firsts = range(-self.pad, size_out * self.stride - self.pad, self.stride)
        return sum(first + at * self.rhs_dilate in on_input for first in firsts for at in range(self.size))


def _windows(attributes: str) -> list[_Window]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    if not found:
        return []
    given = dict(part.split("=") for part in found[1].split())
    values = {name: given[name].split("x") for name in ("size", "stride", "lhs_dilate", "rhs_dilate") if name in given}
    # Before and after; what is after follows from the sizes.
    values |= {"pad": [pad.split("_")[0] for pad in given["pad"].split("x")]} if "pad" in given else {}
    return [_Window(**dict(zip(values, map(int, of), strict=True))) for of in zip(*values.values(), strict=True)]


def _summed_by_dot(instruction: _Instruction, types: dict[str, str]) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.rest)[1]
    lhs = _dims(types[instruction.operands[0]])
    return math.prod(lhs[int(dim)] for dim in dims.split(",") if dim)
