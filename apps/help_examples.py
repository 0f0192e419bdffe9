"""Examples at the end of --help; tests/e2e/test_docs.py runs those that need nothing but the embedded model."""

from __future__ import annotations

EXAMPLES = {
    "generate": 'edge-sd generate "a red apple, glossy style" --seed 7 --output apple.png',
    "batch": "edge-sd batch prompts.csv --steps 20 --contact-sheet",
    "upscale": "edge-sd upscale photo.jpg --scale 2",
    "interpolate": 'edge-sd interpolate "a red apple" "a yellow lemon" --seed 7 --frames 3 --output strip.png',
    "info": "edge-sd info apple.png",
    "devices": "edge-sd devices --prefer battery",
    "tune": "edge-sd tune --seconds 60",
    "doctor": "edge-sd doctor --json",
    "convert": "edge-sd convert SOURCE BUNDLE --to openvino --precision int8",
    "run": 'edge-sd run ORG/NAME "a lighthouse" --seed 7',
    "serve": "edge-sd serve --port 7860",
    "desktop": "edge-sd desktop",
    "mcp": "edge-sd mcp",
}


def epilog(command: str) -> str | None:
    """The last line of a command's help page; None where it has no example."""
    return f"Example: {EXAMPLES[command]}" if command in EXAMPLES else None
