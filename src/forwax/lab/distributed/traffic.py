"""What a compiled program sends between devices, read in its text."""

import re
from math import prod
from typing import Any

from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed.placement import num_devices
from forwax.lab.distributed.team import TEAM
from forwax.lab.report import Json

COLLECTIVES = [
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
]

# `%name = shape opcode(...)`, with a start and an end where it runs beside other work
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?\S+ = (.*?) ([a-z][a-z-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^, ]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def collective_bytes(text: str) -> int:
    """Count the bytes of the results of all collectives, on one device.

    A loop counts as often as its compiled form says that it runs, and once where it says nothing;
    of two branches the greater one counts.

    Args:
        text: of a compiled program, `jitted.lower(...).compile().as_text()`.

    >>> collective_bytes('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %sum = f32[8]{0} all-reduce(%x), to_apply=%add
    ... }''')
    32
    """
    lines: dict[str, list[str]] = {}
    inside = entry = ""
    for line in text.splitlines():
        begun = _COMPUTATION.match(line)
        if begun:
            inside = begun[1]
            entry = inside if line.startswith("ENTRY") else entry
        if inside:
            lines.setdefault(inside, []).append(line)
    found: dict[str, int] = {}

    # no line is in a computation without a name
    def count(computation: str) -> int:
        if computation not in found:
            found[computation] = sum(map(of_line, lines.get(computation, ())))
        return found[computation]

    def of_line(line: str) -> int:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            return 0
        shape, code = instruction.groups()
        # what begins one beside other work has its operands in its result
        if code.removesuffix("-done") in COLLECTIVES:
            return _size(shape)
        trips = _TRIPS.search(line) if code == "while" else None
        branches = ",".join(map("".join, _BRANCHES.findall(line)))
        inner = sum(map(count, _CALLED.findall(line)))
        return int(trips[1] if trips else 1) * inner + max(
            map(count, re.sub("[% ]", "", branches).split(","))
        )

    return count(entry)


def tell(program: Any, settings: Settings) -> Json:
    """Print a run's processes, devices and what passes between them in a step.

    Args:
        program: a `CompiledTraining`.
        settings: its settings.

    Returns:
        The same, for a summary.
    """
    count = num_devices(settings)
    sent = collective_bytes(program.block.as_text()) if count > 1 else 0
    if count > 1:
        others = f", in {TEAM.count} processes" if TEAM.count > 1 else ""
        print(
            f"Devices: {count}{others}; collectives of {sent:,} bytes a step.",
            flush=True,
        )
    elif settings.data_parallel:
        print("--data-parallel changes nothing: there is one device.", flush=True)
    return {
        "num_processes": TEAM.count,
        "num_devices": count,
        "collective_bytes_per_step": sent,
    }


def _size(shape: str) -> int:
    """The bytes of an array or a tuple of arrays, as HLO writes them."""
    return (
        sum(
            _item_bits(kind) * prod(int(n) for n in axes.split(",") if n)
            for kind, axes in _ARRAY.findall(shape)
        )
        // 8
    )


def _item_bits(kind: str) -> int:
    """The bits of an item: pred, s32, bf16, f8e4m3fn, c64."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8
