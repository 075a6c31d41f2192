"""Turns videos into shards of latents and text embeddings. README.md describes the files."""
