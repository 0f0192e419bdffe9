"""`python -m edge_sd` is the command `edge-sd`."""

from edge_sd.apps.cli import main

if __name__ == "__main__":
    main()
