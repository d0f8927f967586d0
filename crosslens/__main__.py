"""`python -m crosslens` is the command line; torchrun starts it several times."""

import os

if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough; tqdm asks when it is imported

from crosslens.cli import main

main()
