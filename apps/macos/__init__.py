"""The desktop script for macOS, and what puts it where a Mac's user looks: `edge-sd macos`."""
