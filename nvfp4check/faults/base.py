"""What a kernel fault is: a known way of computing an operation wrongly, ready to be planted.

Contract:
    A form is one wrong computation of one operation. Around a kernel, it changes what goes in or
    what comes out and leaves the kernel to do the rest, so it can be planted in any kernel; else
    it is a whole wrong computation with the operation's signature, which no kernel takes part in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nvfp4check.findings import CheckError
from nvfp4check.ops import OPERATIONS, Kernel

#: Takes the kernel first if the form goes around one, then the operation's arguments; takes
#: `convention` by name if the operation has one and the form goes around none.
Wrong = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One wrong computation of one operation."""

    operation: str
    wrong: Wrong
    #: Which of several forms this is; empty where there is one.
    label: str = ""
    #: Whether it only changes what goes into a kernel, or comes out.
    around: bool = False
    #: Conventions under which it is wrong; none named means every one.
    conventions: tuple[str, ...] = ()

    def apply(self, convention: str | None = None, kernel: Kernel | None = None) -> Kernel:
        """Return the wrong computation as a kernel: in a kernel that is given, or the reference.

        Raises:
            CheckError: A kernel is given that the form does not go around.
        """
        if not self.around:
            if kernel is not None:
                raise CheckError(f"this fault replaces {self.operation}: it goes into no kernel")
            named = OPERATIONS[self.operation].has_convention
            return partial(self.wrong, convention=convention) if named else self.wrong
        inner = kernel or OPERATIONS[self.operation].reference(convention)
        return partial(self.wrong, inner)

    def convention_for(self, asked: str | None) -> str | None:
        """Return the convention to try the form under: the one asked for where it is wrong there.

        None where the operation has no convention.
        """
        if not OPERATIONS[self.operation].has_convention:
            return None
        if self.conventions and asked not in self.conventions:
            return self.conventions[0]
        return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFault:
    """A mistake that real kernels made."""

    id: str
    name: str
    #: The wrong computation in one line.
    does: str
    #: What an input must hold for the fault to show.
    needs: str
    #: Public threads that report it, as owner/name/pull/1; none for a neighbour of a reported one.
    threads: tuple[str, ...]
    forms: tuple[Form, ...]

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations it can be planted in."""
        return tuple(dict.fromkeys(form.operation for form in self.forms))

    @property
    def urls(self) -> tuple[str, ...]:
        """The threads as addresses."""
        return tuple(f"https://github.com/{thread}" for thread in self.threads)

    def forms_of(self, operation: str) -> tuple[Form, ...]:
        """Return the forms in one operation."""
        return tuple(form for form in self.forms if form.operation == operation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElsewhereFault:
    """A fault of the catalogue that no call of a single operation can show, and who shows it."""

    id: str
    does: str
    caught_by: str
