"""``python -m mbc_core.cli``."""

import sys

from mbc_core.cli import cli, run

if __name__ == "__main__":
    sys.exit(run(cli, prog="python -m mbc_core.cli"))
