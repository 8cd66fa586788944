"""The table of commands: the one place that knows which commands exist.

A line is `name: Entry(module, one line of help)`. The module is imported when its command is
called and not before, so that `nvfp4check --help` costs no more than this table.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a command lives, and its line in the list of commands."""

    module: str
    help: str


COMMANDS: dict[str, Entry] = {
    "validate": Entry("nvfp4check.cli.validate", "Is this checkpoint sound?"),
    "diff": Entry("nvfp4check.cli.diff", "What differs between two checkpoints, in meaning."),
    "forward": Entry("nvfp4check.cli.forward", "The reference forward pass, streamed from disk."),
    "agree": Entry("nvfp4check.cli.agree", "Do two runs agree, layer by layer and in logits?"),
    "capture": Entry("nvfp4check.cli.capture", "A run from a server that speaks the OpenAI API."),
    "golden": Entry("nvfp4check.cli.golden", "Keep a run as a golden; check against it."),
    "inspect": Entry("nvfp4check.cli.inspect", "What is in this checkpoint?"),
    "kernels": Entry("nvfp4check.cli.kernels", "Check kernels property by property."),
    "faults": Entry("nvfp4check.cli.faults", "Faults that were shipped: list or plant them."),
    "synth": Entry("nvfp4check.cli.synth", "A synthetic checkpoint of any size."),
    "release": Entry("nvfp4check.cli.release", "The whole gate: validate, forward, agree, a page."),
    "report": Entry("nvfp4check.cli.report", "Several JSON results in one HTML page."),
    "rules": Entry("nvfp4check.cli.rules", "What each rule of validate checks, and the repair."),
}
