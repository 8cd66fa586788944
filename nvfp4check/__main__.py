"""Run the command line as `python -m nvfp4check`."""

import sys

from nvfp4check.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
