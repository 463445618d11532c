"""Parameters in, update out."""
