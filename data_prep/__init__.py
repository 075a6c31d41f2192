"""Real video in, shards of latents and text embeddings out. The folder's README.md is its map."""
