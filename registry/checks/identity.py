"""The fingerprint, made twice from the start: a hook that does not always answer alike shows here."""

from __future__ import annotations

from registry.checks.report import Findings
from registry.checks.subject import Subject
from registry.fingerprint import fingerprint


def check_fingerprint(subject: Subject, findings: Findings) -> str:
    """Both are equal, part by part."""
    first = fingerprint(subject.family)
    second = fingerprint(Subject(subject.model_dir, subject.plugins).family)
    for name in first.differences(second):
        once, again = (parts.get(name, b"").hex()[:16] for parts in (first.parts, second.parts))
        findings.fail(name, "", f"{once or 'the same'} both times", f"{again or 'other values'} the second time")
    subject.fingerprint = first
    return first.digest.hex()
