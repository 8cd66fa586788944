"""Properties asked in a child process, so that a kernel that ends its process is a result.

The child is forked before torch is loaded, says what it begins and what it finds through a pipe,
and writes what kernels print to the standard error. Where it dies or does not come back, the
property under way has failed, and another child goes on with the next. So it does where a kernel
leaves the GPU's context unusable, in which every later call fails whatever it computes.
"""

import json
import os
import select
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import NoReturn

from nvfp4check.cli.kernels_runs import Key, Question, Record, asked
from nvfp4check.findings import CheckError

#: Children that may die over one implementation before its other properties are left out.
MOST_DEATHS = 3

#: Exit code of a child in which something raised KeyboardInterrupt.
_INTERRUPTED = 130

#: Yields the records of a question, but for what is known, and little of implementations lost.
Asker = Callable[[Mapping[Key, Record], Collection[tuple[str, str]]], Iterator[Record]]


def possible() -> bool:
    """Tell whether a child can be forked: not where torch, and its threads, are loaded already."""
    return hasattr(os, "fork") and "torch" not in sys.modules


def asked_apart(question: Question, seconds: float | None = None) -> list[Record]:
    """Return the records of every property; each may take so many seconds.

    Raises:
        CheckError: What was asked for is not there, or the process ended before a property began.
    """
    who = question.impl or question.op or ""
    return told_apart(partial(asked, question), who, seconds, MOST_DEATHS)


def told_apart(
    ask: Asker, who: str, seconds: float | None = None, most_deaths: int | None = None
) -> list[Record]:
    """Return the records that a child process tells; each may take so many seconds.

    An implementation whose process has ended so often is lost; by default none is.

    Raises:
        CheckError: The question was refused, or the process ended before anything was begun.
    """
    known: dict[Key, Record] = {}
    deaths: Counter[tuple[str, str]] = Counter()
    while True:
        lost = {one for one, n in deaths.items() if most_deaths is not None and n >= most_deaths}
        told = list(_told(ask, known, lost, seconds))
        last = told[-1] if told else {}
        death = last.get("death")
        if death is None and "unusable" not in last:
            return told
        run, begun = _learn(told, known)
        if run is None or (death and begun is None):
            raise CheckError(f"{who}: the process {death} before a property was asked")
        op, impl = run["op"], run["impl"]
        if begun is not None:
            outcome = {**begun["if_ended"], "message": f"the kernel's process {death}"}
            known[op, impl, begun["begun"]] = outcome
        deaths[op, impl] += 1


def _learn(told: list[Record], known: dict[Key, Record]) -> tuple[Record | None, Record | None]:
    """Note what was found; return the run and the property that were under way."""
    run = begun = None
    for record in told:
        if "run" in record:
            run, begun = record["run"], None
        elif "begun" in record:
            begun = record
        elif "found" in record and run is not None:
            known[run["op"], run["impl"], record["found"]] = record["outcome"]
            begun = None
    return run, begun


def _told(
    ask: Asker,
    known: Mapping[Key, Record],
    lost: Collection[tuple[str, str]],
    seconds: float | None,
) -> Iterator[Record]:
    """Yield a child's records; one that says why another must go on is the last, if so it is.

    Raises:
        CheckError: The child refused the question.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(ask, known, lost, writing)
    os.close(writing)
    death = None
    try:
        for line in _lines(reading, seconds):
            if line is None:
                os.kill(child, signal.SIGKILL)
                death = f"did not come back within {seconds:g} s"
                break
            record = json.loads(line)
            if "done" in record:
                return
            if "refused" in record:
                raise CheckError(record["refused"])
            if "internal" in record:
                raise RuntimeError(record["internal"])
            yield record
            if "unusable" in record:
                os.kill(child, signal.SIGKILL)
                return
    except BaseException:  # whatever ends this process, Ctrl-C too, ends the child
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    yield {"death": death or _death(os.waitstatus_to_exitcode(status))}


def _lines(reading: int, seconds: float | None) -> Iterator[bytes | None]:
    """Yield lines as they come; None, and nothing after it, where one takes too long."""
    rest = b""
    while True:
        ready, _, _ = select.select([reading], [], [], seconds)
        if not ready:
            yield None
            return
        got = os.read(reading, 1 << 16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from whole


def _death(code: int) -> str:
    if code == _INTERRUPTED:
        return "raised KeyboardInterrupt"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _answer(
    ask: Asker, known: Mapping[Key, Record], lost: Collection[tuple[str, str]], writing: int
) -> NoReturn:
    """Be the child: tell every record, and end without what an ordinary end would run."""
    code = 0
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        for record in ask(known, lost):
            _tell(writing, record)
        # A kernel may end the process with any exit code, so that none says this.
        _tell(writing, {"done": True})
    except CheckError as error:
        _tell(writing, {"refused": str(error)})
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception:  # the border of the process: the parent says it
        _tell(writing, {"internal": traceback.format_exc()})
    finally:
        sys.stderr.flush()
        os._exit(code)


def _tell(writing: int, record: Record) -> None:
    text = json.dumps(record).encode() + b"\n"
    while text:
        text = text[os.write(writing, text) :]
