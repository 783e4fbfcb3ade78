"""Pages that show a model at work, and the server that lets one ask it."""
