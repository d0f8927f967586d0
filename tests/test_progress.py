"""Progress bars in a terminal and in a log file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

NESTED = """
import sys, time
from crosslens import progress
progress.EVERY = float(sys.argv[1])
for _ in progress.tqdm(range(30), desc="Outer", leave=False):
    for _ in progress.tqdm(range(10), desc="Inner", leave=False):
        time.sleep(0.005)
with progress.tqdm(total=1000, desc="Training", unit=" tokens", leave=False, miniters=1, mininterval=0) as bar:
    for _ in range(100):
        time.sleep(0.005)
        bar.update(10)
progress.tqdm.write("done", file=sys.stderr)
"""


def test_a_log_file_has_plain_lines_and_a_quiet_end() -> None:
    told = subprocess.run([sys.executable, "-c", NESTED, "0.5"], capture_output=True, check=True).stderr.decode()
    *lines, last = told.splitlines()
    assert last == "done"
    assert 2 <= len(lines) <= 5  # two seconds, whatever the bars
    assert all(re.match(r"(Outer|Inner|Training): +\d+%\|", line) for line in lines)
    assert not set("\r\x1b") & set(told)


def test_a_short_command_writes_no_line() -> None:
    told = subprocess.run([sys.executable, "-c", NESTED, "30"], capture_output=True, check=True).stderr
    assert told == b"done\n"


def test_a_terminal_has_a_bar_that_redraws_itself() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", NESTED, "30"], stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    told = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        told += part
    os.close(ours)
    assert process.wait() == 0
    assert told.count(b"\r") > 20 and b"Outer" in told and b"Inner" in told
