"""A run's log as an event file for TensorBoard, with the names that transformers' Trainer gives its curves there.

A file is a row of records: length (uint64), its masked crc32c (uint32), the bytes, their masked crc32c (uint32), all little-endian
(tensorflow/core/lib/io/record_writer.cc). The bytes are an `Event` in protobuf's wire format (tensorflow/core/util/event.proto and
tensorflow/core/framework/summary.proto); of its fields wall_time, step, file_version and summary with simple values are used. The checksum is
the Castagnoli polynomial of RFC 3309. TensorBoard itself is not needed for any of this.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Mapping

from engine.core.events import LOG_NAME
from jobs.models import Event, Job
from jobs.places import job_folder
from jobs.points import Told, parsed, points

PIECE_BYTES = 1 << 16  # sent at once
VERSION = b"brain.Event:2"
_MASK_DELTA = 0xA282EAD8


def event_file(job: Job) -> Iterator[bytes]:
    """The bytes of the event file of a run, up to what the database shows of its log, piece by piece."""
    piece = bytearray(record(_double(1, job.created.timestamp()) + _bytes(3, VERSION)))
    for point in points(_told(job)):
        piece += record(scalars(point.moment, point.step, point.in_folders()))
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def record(data: bytes) -> bytes:
    """One record: the length and the bytes, each with its checksum."""
    length = struct.pack("<Q", len(data))
    return b"%b%b%b%b" % (length, struct.pack("<I", masked(length)), data, struct.pack("<I", masked(data)))


def scalars(moment: float, step: int, values: Mapping[str, float]) -> bytes:
    """An Event with one simple value for each tag."""
    summary = b"".join(_value(tag) + _single(value) for tag, value in values.items())
    return _double(1, moment) + b"\x10" + _varint(step) + _bytes(5, summary)


def masked(data: bytes) -> int:
    """The crc32c of some bytes, turned and shifted as the format wants it, because checksums of checksums are bad ones."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, two bytes at a time."""
    table = _table()
    whole = len(data) & ~1
    checksum = 0xFFFFFFFF
    for pair in struct.unpack(f"<{whole >> 1}H", data[:whole]):
        checksum = table[(checksum ^ pair) & 0xFFFF] ^ checksum >> 16
    for byte in data[whole:]:
        checksum = _shifted((checksum ^ byte) & 0xFF, 8) ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


@functools.cache
def _table() -> list[int]:
    """What sixteen shifts make of each pair of bytes; it is linear, so that each entry follows from two shorter ones."""
    table = [0] * (1 << 16)
    for bit in range(16):
        table[1 << bit] = _shifted(1 << bit, 16)
        for below in range(1, 1 << bit):
            table[1 << bit | below] = table[1 << bit] ^ table[below]
    return table


def _shifted(value: int, times: int) -> int:
    for _ in range(times):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


def _told(job: Job) -> Iterator[Told]:
    """The log itself, up to where the database stands; where its file is gone, what the database kept."""
    path = job_folder(job.pk) / LOG_NAME
    if path.exists() and path.stat().st_size >= job.log_offset > 0:
        with path.open("rb") as file:
            while file.tell() < job.log_offset:
                told = parsed(file.readline())
                if told is not None:
                    yield told
    else:
        events = Event.objects.filter(job=job, seq__lte=job.last_seq, kind__in=("metric", "evaluation"))
        for event in events.order_by("seq").iterator(chunk_size=50):
            yield Told(event.time, event.kind, event.step, event.data)


@functools.lru_cache(1000)
def _value(tag: str) -> bytes:
    """A Summary.Value up to its number, which is always four bytes long."""
    inside = _bytes(1, tag.encode()) + b"\x15"
    return b"\x0a" + _varint(len(inside) + 4) + inside


def _single(value: float) -> bytes:
    try:
        return struct.pack("<f", value if math.isfinite(value) else math.nan)
    except OverflowError:  # beyond the greatest of 32 bits
        return struct.pack("<f", math.nan)


def _double(field: int, value: float) -> bytes:
    return bytes((field << 3 | 1,)) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes((field << 3 | 2,)) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
