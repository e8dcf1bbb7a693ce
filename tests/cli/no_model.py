"""A module of an executor model that cannot be imported."""

1 / 0  # noqa: B018
