"""Families outside the built-in ones, registered the way a model developer would."""
