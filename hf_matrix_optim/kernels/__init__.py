"""GPU fast paths, each beside the plain function that defines it; nothing here is needed for a correct step."""
