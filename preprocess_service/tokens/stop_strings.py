"""Stop strings in a stream of text: nothing of one is ever given out."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until the first stop string is complete.

    Text that may be the beginning of a stop string is held back until it is settled. The result does not
    depend on how the text is cut into pieces: the stop string that is complete first counts, the longest of
    those that end at the same place.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to give out; `matched` is set once a stop string is complete."""
        if not self._stops or not text:
            return text
        buffer, num_old = self._held + text, len(self._held)
        # One that is complete in what was held back was skipped.
        begins = {stop: max(num_old + 1 - len(stop), 0) for stop in self._stops}
        found = [(at + len(s), at, s) for s, begin in begins.items() if (at := buffer.find(s, begin)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return buffer[:start]
        return self._hold(buffer)

    def skip(self, text: str) -> str:
        """As `feed`, but stop strings that this text completes do not count."""
        return self._hold(self._held + text) if self._stops else text

    def _hold(self, buffer: str) -> str:
        """Keep the longest end of the text that may be the beginning of a stop string; give the rest."""
        num_held = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
    at = tail.find(stop[0])
    while at >= 0:
        if stop.startswith(tail[at:]):
            return len(tail) - at
        at = tail.find(stop[0], at + 1)
    return 0
