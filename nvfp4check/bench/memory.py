"""How much memory this process has and had, mapped files included.

`resource.getrusage` will not do: a new process inherits the peak of the one that started it.
"""

from pathlib import Path


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 where the system does not tell.

    VmHWM is the peak of what was resident; RssAnon what the process holds of its own, without the
    page cache.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields.get(field, "0 kB").split()[0]) * 1024
