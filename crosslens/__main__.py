"""`python -m crosslens` runs the command line; torchrun starts one process per device."""

import os
import sys
import traceback

if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough; tqdm reads this when it is imported

from crosslens.cli.app import main

try:
    main()
except BaseException as error:
    code = error.code if isinstance(error, SystemExit) else 1
    if not code or os.environ.get("WORLD_SIZE", "1") == "1":
        raise
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # skip cleanup that may wait for other processes; torchrun ends them
