"""The contract under fire: generated requests against a real server."""
