"""Core ML packages as bytes: read, decompressed and rewritten with numpy alone."""
