"""`make bench`: every benchmark that needs no GPU."""

from __future__ import annotations

import sys

from benchmarks import served

if __name__ == "__main__":
    sys.exit(served.main([]))
