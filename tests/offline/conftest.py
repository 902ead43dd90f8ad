"""Makes the helpers that several tests of ops share importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
