"""`python -m llm_runtime`: the command `runtime`."""

import sys

from llm_runtime.runtime.cli import main

sys.exit(main())
