"""A trained network behind HTTP: a page to drop pictures on and a JSON endpoint with the same answers."""
