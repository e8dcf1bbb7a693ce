"""Prints the fingerprint of the checkpoint directory that is named, as JSON."""

from __future__ import annotations

import json
import sys

from registry.context import InputContext
from registry.families import bind_family
from registry.fingerprint import fingerprint

if __name__ == "__main__":
    found = fingerprint(bind_family(InputContext.from_checkpoint(sys.argv[1])))
    parts = {name: value.hex() for name, value in found.parts.items()}
    print(json.dumps({"digest": found.digest.hex(), "parts": parts, "probes": found.probes}))
