"""The programs that people start: command line, comparison, benchmark, service, macOS scripts."""
