"""The demo model: a small LLaVA-1.5-shaped checkpoint that reads handwritten digits, and how it was made."""

import os

# grpc notes every connection that a server ends, also when Ctrl-C ends the demo; it reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
