"""The local HTTP service: one engine, three APIs, one page."""
