"""What a batch seals at once, in numbers: the jobs of the kernels in seal.cu. Knows segments, no memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..base import SegmentChange
from .append_assign import ASSIGN_JOB

TILE_ROWS = 32
"""Rows that a block of saap_permute moves."""
ALL_HEADS = 2**31 - 1


class Job(NamedTuple):
    """One segment to be sealed: rows [first, first + rows) of a sequence become its segment number ``slot``.

    at : place of its first row among those of all jobs, see `places`. Rows before ``fresh`` lie in segments old, old + 1, ...,
    ``olds`` of them, one after the other; the others are in arrival order, and place fresh_at of list_nos and positions is of the
    first of them. position : of that token, where positions follow one another; -1: the ids of every row are there already.
    head, past_head : the KV heads whose rows move. With ALL_HEADS for the second the others get their table; else they get
    nothing, and the tables of the old segments become that of the whole, each cut at its bounds.
    """

    sequence: int
    first: int
    rows: int
    at: int
    slot: int
    old: int
    olds: int
    fresh: int
    fresh_at: int
    position: int
    head: int = 0
    past_head: int = ALL_HEADS


JOB = len(Job._fields)


def places(rows: int) -> int:
    """What a job takes of the places of all jobs: whole blocks of the kernel, at least one."""
    return max(1, -(-rows // TILE_ROWS)) * TILE_ROWS


@dataclass(frozen=True)
class Plan:
    """What a batch seals at once. numbers : int32 (n), all that the device has to know: the jobs, the stretches to assign from
    stretches_at on, sequence and segment of the runs whose means are due from means_at on, and from positions_at on (-1: they
    follow one another) positions of the fresh rows. fresh : how many those are, longest : those of one sequence at most."""

    jobs: Sequence[Job]
    numbers: np.ndarray[Any, Any]
    stretches: int
    stretches_at: int
    means: int
    means_at: int
    positions_at: int
    fresh: int
    longest: int


def planned(changes: Sequence[SegmentChange]) -> Plan:
    """The jobs that these changes take, in their order."""
    jobs: list[Job] = []
    stretches, means, at, fresh_at, longest = [], [], 0, 0, 0
    gaps = False
    for c in changes:
        old, i = c.first, c.sequence
        sealed = c.have[-1][1] if c.have else 0
        begin, count = max(sealed, c.want[c.first][0]), len(c.positions)
        numbers_of = {start: s for s, (start, _) in enumerate(c.have)}
        position = int(c.positions[0]) if count else 0
        gaps = gaps or (count > 0 and int(c.positions[-1]) - position != count - 1)
        for slot in range(c.first, len(c.want)):
            start, stop = c.want[slot]
            first_old = old
            while old < len(c.have) and c.have[old][1] <= stop:
                old += 1
            fresh = c.have[old - 1][1] if old > first_old else start
            if fresh == stop and old == first_old + 1 == slot + 1:
                continue  # it stays what it is
            head = ALL_HEADS if fresh == stop and old == first_old + 1 else 0 if fresh < stop else c.sorted_heads(first_old, old)
            place = (fresh_at + fresh - begin, position + fresh - begin) if fresh < stop else (0, 0)
            jobs.append(Job(i, start, stop - start, at, slot, first_old, old - first_old, fresh, *place, head))
            at += places(stop - start)
        if c.merging is not None:
            slot, past, heads = c.merging
            start, stop = c.want[slot][0], c.want[past - 1][1]
            first_old = numbers_of[start]
            done = c.sorted_heads(first_old, first_old + past - slot)
            jobs.append(Job(i, start, stop - start, at, slot, first_old, past - slot, stop, 0, 0, done, heads))
            at += places(stop - start)
        if count:
            stretches.append((i, begin, count, fresh_at, position, 0, 0, 0))
        means += [(i, s) for s in range(c.first, c.means)]
        fresh_at, longest = fresh_at + count, max(longest, count)
    flat = [x for part in (jobs, stretches, means) for numbers in part for x in numbers]
    # NumPy takes ten times as long over tuples
    numbers: np.ndarray[Any, Any] = np.frombuffer(bytearray(struct.pack(f"{len(flat)}i", *flat)), np.int32)
    if gaps:
        numbers = np.concatenate([numbers, *(c.positions.astype(np.int32) for c in changes)])
    stretches_at = len(jobs) * JOB
    means_at = stretches_at + len(stretches) * ASSIGN_JOB
    positions_at = means_at + 2 * len(means) if gaps else -1
    sizes = len(stretches), stretches_at, len(means), means_at, positions_at, fresh_at, longest
    return Plan(jobs, numbers, *sizes)
