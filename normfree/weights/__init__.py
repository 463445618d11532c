"""Weight files and the names in them: reading, writing and conversion to our names; independent of any network."""
