"""``python -m fewshot_seg``."""

import sys

from fewshot_seg.cli import main

sys.exit(main())
