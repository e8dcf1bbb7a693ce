"""What commands print: errors to standard error, one JSON object to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping


def print_error(code: str, message: str, details: Mapping[str, str]) -> None:
    """`STATUS_NAME: message`, then one line per detail."""
    print(f"{code}: {message}", file=sys.stderr)
    for name, value in details.items():
        print(f"  {name}: {value}", file=sys.stderr)


def print_json(value: object) -> None:
    """One object on one line."""
    print(json.dumps(value, ensure_ascii=False))
