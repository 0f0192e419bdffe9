"""Core ML: torch components -> ML Programs in Apple's layout, and the executor that measures them on any OS."""
