"""The version, defined once: pyproject.toml and pictures read it here."""

__version__ = "0.1.0"
