"""`python -m gflowtrl`: the same as the command `gflowtrl`."""

import sys

from gflowtrl.cli import main


if __name__ == "__main__":
    sys.exit(main())
