"""Reading ahead: in order, within its limit, and never in the way of what is needed now."""

import threading
from collections.abc import Iterator

import pytest
import torch

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import Layout, LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.findings import CheckError
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead, as_stored, rows_of

SIZE = 64


class Tape:
    """A storage of counted bytes that remembers the order of its reads and can be held up."""

    location = "tape"
    unsafe: dict[str, str] = {}  # noqa: RUF012  (the protocol's attribute)

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.threads: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def list(self) -> dict[str, int]:
        return {"shard": 1 << 20}

    def view(self, name: str) -> memoryview | None:
        return None

    def read(self, name: str, start: int, stop: int) -> bytes:
        assert self.go_on.wait(10)
        self.reads.append(start // SIZE)
        self.threads.add(threading.current_thread().name)
        if start // SIZE == 13:
            raise StorageError("shard: torn")
        return bytes([start // SIZE]) * (stop - start)


def weight(number: int) -> LogicalWeight:
    entry = TensorEntry(f"w{number}", "U8", (8, 8), "shard", number * SIZE, (number + 1) * SIZE)
    return LogicalWeight(
        f"w{number}", "w", WeightFormat.OTHER, Layout.PLAIN, {Part.PLAIN: entry}, (8, 8)
    )


@pytest.fixture
def tape() -> Iterator[Tape]:
    tape = Tape()
    yield tape
    tape.go_on.set()


def settled(tape: Tape, count: int) -> None:
    """Wait until so many reads are done, and a moment longer for one too many."""
    for _ in range(1000):
        if len(tape.reads) >= count:
            break
        threading.Event().wait(0.002)
    threading.Event().wait(0.02)


def test_announced_weights_are_read_in_order_beside_the_caller(tape: Tape) -> None:
    with ReadAhead(tape, 10 * SIZE, Meter()) as reader:
        reader.announce(weight(n) for n in range(5))
        settled(tape, 5)

        assert tape.reads == [0, 1, 2, 3, 4]
        for number in range(5):
            assert set(reader.take(weight(number))[Part.PLAIN].tolist()) == {number}
    assert len(tape.reads) == 5
    assert threading.current_thread().name not in tape.threads


def test_no_more_is_held_than_the_limit_and_taking_makes_room(tape: Tape) -> None:
    with ReadAhead(tape, 2 * SIZE, Meter()) as reader:
        reader.announce(weight(n) for n in range(6))
        settled(tape, 2)
        assert tape.reads == [0, 1]

        reader.take(weight(0))
        settled(tape, 3)
        assert tape.reads == [0, 1, 2]


def test_a_weight_above_the_limit_is_read_alone(tape: Tape) -> None:
    with ReadAhead(tape, SIZE // 2, Meter()) as reader:
        reader.announce([weight(0), weight(1)])
        settled(tape, 1)

        assert tape.reads == [0]
        reader.take(weight(0))
        assert set(reader.take(weight(1))[Part.PLAIN].tolist()) == {1}


def test_another_order_than_announced_cannot_lock(tape: Tape) -> None:
    with ReadAhead(tape, 2 * SIZE, Meter()) as reader:
        reader.announce(weight(n) for n in range(6))

        for number in (5, 3, 0, 4, 2, 1, 9):  # the last was never announced
            assert set(reader.take(weight(number))[Part.PLAIN].tolist()) == {number}
    assert sorted(tape.reads) == [0, 1, 2, 3, 4, 5, 9]


def test_an_error_reaches_whoever_takes_the_weight(tape: Tape) -> None:
    with ReadAhead(tape, 10 * SIZE, Meter()) as reader:
        reader.announce([weight(12), weight(13), weight(14)])
        settled(tape, 3)

        reader.take(weight(12))
        with pytest.raises(CheckError, match="w13: shard: torn"):
            reader.take(weight(13))
        reader.take(weight(14))


def test_closing_gives_up_what_was_not_read(tape: Tape) -> None:
    tape.go_on.clear()
    with ReadAhead(tape, 10 * SIZE, Meter()) as reader:
        reader.announce(weight(n) for n in range(9))
        threading.Timer(0.05, tape.go_on.set).start()
    assert len(tape.reads) <= 1


def test_bytes_and_waiting_are_metered(tape: Tape) -> None:
    meter = Meter()
    heard = []
    with ReadAhead(tape, SIZE, meter, lambda: heard.append(meter.bytes_read)) as reader:
        reader.announce([weight(0), weight(1)])
        reader.take(weight(0))
        reader.take(weight(1))

    assert heard == [SIZE, 2 * SIZE]
    assert meter.seconds["wait"] >= 0


def test_rows_of_a_weight_are_its_bytes_between() -> None:
    rows = rows_of(weight(2), 3, 5)

    entry = rows.parts[Part.PLAIN]
    assert rows.shape == entry.shape == (2, 8)
    assert (entry.start, entry.stop) == (2 * SIZE + 24, 2 * SIZE + 40)
    whole = torch.arange(SIZE, dtype=torch.uint8)
    part = as_stored(whole[entry.start - 2 * SIZE : entry.stop - 2 * SIZE], entry)
    assert torch.equal(part, whole.view(8, 8)[3:5])


def test_rows_of_fp8_begin_at_a_block() -> None:
    elements = TensorEntry("w", "F8_E4M3", (300, 10), "shard", 0, 3000)
    scales = TensorEntry("s", "F32", (3, 1), "shard", 3000, 3012)
    fp8 = LogicalWeight(
        "w",
        "w",
        WeightFormat.FP8_BLOCK,
        Layout.DEEPSEEK_FP8,
        {Part.CODES: elements, Part.SCALE_INV: scales},
        (300, 10),
    )

    last = rows_of(fp8, 256, 300)
    assert last.parts[Part.SCALE_INV].shape == (1, 1)
    assert last.parts[Part.SCALE_INV].start == 3008
    with pytest.raises(ValueError, match="row 200"):
        rows_of(fp8, 200, 300)
