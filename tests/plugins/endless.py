"""A plugin whose import does not end; it says in which process it has begun."""

import os
import sys
import threading

print(f"endless import in {os.getpid()}", file=sys.stderr, flush=True)
threading.Event().wait()
