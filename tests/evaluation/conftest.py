"""A tiny CLIP with random weights, in the format of the published ones."""

import json

import pytest
import torch

from tests.generation.conftest import decodable_dataset, tiny_generator

__all__ = ["decodable_dataset", "tiny_generator"]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a CLIP of byte tokens, 32 of them at most, and pictures of 32 x 32 pixels."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 32, "bos_token_id": 512, "eos_token_id": 513}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder, model_max_length=32)).save_pretrained(folder)
    return folder
