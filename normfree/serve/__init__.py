"""An HTTP server for a trained network: a web page for images, and a JSON endpoint with the same predictions."""
