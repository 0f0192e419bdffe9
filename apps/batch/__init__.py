"""`edge-sd batch`: a file of requests becomes a folder of pictures, and goes on where it was stopped."""
