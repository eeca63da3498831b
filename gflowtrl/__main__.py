"""`python -m gflowtrl` is `gflowtrl`."""

import sys

from gflowtrl.cli import main


if __name__ == "__main__":
    sys.exit(main())
