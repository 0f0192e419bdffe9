"""Core AI: `.aimodel`s in the layout that Apple's Swift package loads, measured by Apple's own runtime."""
