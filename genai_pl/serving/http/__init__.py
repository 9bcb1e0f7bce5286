"""Routes: OpenAI's, our own, and those in front of another server."""
