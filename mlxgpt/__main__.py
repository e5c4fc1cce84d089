"""`python -m mlxgpt` is `mlxgpt`."""

import sys

from mlxgpt.cli import main

sys.exit(main())
