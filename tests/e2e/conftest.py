"""Fixtures of tests that go through what people start."""

from ..browser import browser as browser
