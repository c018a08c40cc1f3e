"""The collectives of a compiled program, counted in its text.

A collective is a meeting of all devices. XLA joins all-reduces of one type that do not wait for each other, so that the count
is that of the compiled program, not of the calls in the code.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One meeting of the devices.

    Attributes:
      kind: one of `KINDS`.
      arrays: how many it carries.
      where: the function of the code that asked for it; of joined ones the first.
    """

    kind: str
    arrays: int
    where: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.arrays} ({self.where})"


def collectives(text: str) -> list[Collective]:
    """Those that the compiled program `text` (HLO) executes: of a branch the longest way, of a loop one turn."""
    bodies, entry = _computations(text)
    return _executed(bodies, entry, _places(text))


def counts(found: Sequence[Collective]) -> dict[str, int]:
    """How many there are of each kind, and in all."""
    of_kind = Counter(one.kind for one in found)
    return {kind.replace("-", "_"): of_kind[kind] for kind in KINDS} | {"total": len(found)}


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (.*?) ?([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.-]+)")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _executed(bodies: Mapping[str, Sequence[str]], name: str, places: Mapping[str, str]) -> list[Collective]:
    found: list[Collective] = []
    for line in bodies[name]:
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        kind = instruction[2].removesuffix("-start")
        if kind in KINDS:
            frame = re.search(r"stack_frame_id=(\d+)", line)
            where = places.get(frame[1], "") if frame else ""
            found.append(Collective(kind, len(re.findall(r"\w+\[", instruction[1])), where))
            continue
        for called in _CALLED.findall(line):
            found += _executed(bodies, called, places)
        branches = [x.strip(" %") for listed, one in _BRANCHES.findall(line) for x in (listed or one).split(",")]
        ways: list[list[Collective]] = [_executed(bodies, x, places) for x in branches]
        longest = max(ways, key=len, default=[])
        found += longest
    return found


def _places(text: str) -> dict[str, str]:
    """The function of each stack frame, by the tables at the head of the text."""

    def table(title: str) -> Iterator[tuple[str, str]]:
        if title in text:
            for line in text.split(f"\n{title}\n", 1)[1].splitlines():
                if not line:
                    return
                yield tuple(line.split(" ", 1))  # type: ignore[misc]

    names = {number: name.strip('"') for number, name in table("FunctionNames")}
    of = {number: re.search(r"function_name_id=(\d+)", x) for number, x in table("FileLocations")}
    at = {number: re.search(r"file_location_id=(\d+)", x) for number, x in table("StackFrames")}
    return {frame: names[of[x[1]][1]] for frame, x in at.items() if x and of[x[1]]}  # type: ignore[index]
