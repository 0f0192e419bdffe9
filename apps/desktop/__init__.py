"""The desktop window: the page of the server, with a port and a token of its own."""
