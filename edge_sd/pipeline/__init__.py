"""A request becomes pictures."""
