"""Real video in, webdataset shards of latents and text embeddings out.

    draw.py     renders the demo's world: python -m data_prep.draw
    encode.py   makes a dataset:          python -m data_prep.encode
    video.py    reads any video on a target clock, writes mp4
    codecs.py   pixels to latents and back
    text.py     captions to embeddings
    shards.py   the dataset on disk: tar shards and dataset.json
"""
