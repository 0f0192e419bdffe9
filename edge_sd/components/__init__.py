"""One network as the pipeline calls it, what is put around it, and what is changed in it."""
