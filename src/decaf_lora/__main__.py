"""`python -m decaf_lora` is the command `decaf`."""

import sys

from decaf_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
