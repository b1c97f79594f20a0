"""What `ps` and `pgrep` show: the real tools are Perl programs, and their workers call themselves `task UPID:…`."""

import os
import sys


def set_title(words):
    """Overwrite the memory that /proc/PID/cmdline is read from; as much as fits, silently nothing where it cannot be."""
    try:
        with open("/proc/self/stat", "rb") as handle:
            start, end = (int(field) for field in handle.read().rsplit(b")", 1)[1].split()[45:47])
        title = b"\0".join(os.fsencode(word) for word in words)[:end - start - 1]
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(title.ljust(end - start, b"\0"))
    except (OSError, ValueError):
        pass


def look_like_perl(tool, argv):
    set_title(["/usr/bin/perl", f"/usr/sbin/{tool}", *argv])


if __name__ == "__main__":
    look_like_perl("qm", sys.argv[1:])
    os.system(f"ps -o args= -p {os.getpid()}; pgrep -f '^/usr/bin/perl /usr/sbin/qm a'")
