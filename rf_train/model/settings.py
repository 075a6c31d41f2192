"""The settings of the transformer: the section `model` of a recipe."""

from dataclasses import dataclass

from data_prep.geometry import PATCH
from rf_train.model.chunks import Chunking
from rf_train.settings import require, require_at_least, require_positive

CHECKPOINTINGS = ("none", "block", "selective", "auto")
KERNELS = ("auto", "fa2", "cudnn", "fa3")


@dataclass(frozen=True)
class ModelSettings:
    """The causal DiT. The defaults are Wan2.1 1.3B; 14B is dim 5120, ffn_dim 13824, heads 40, layers 40."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    channels: int = 16  # latent channels, in and out
    text_dim: int = 4096  # width of the text encoder's vectors
    text_len: int = 512  # captions are zero-padded to this many positions, as Wan was trained
    freq_dim: int = 256  # width of the sinusoidal time embedding
    patch: int = PATCH  # a token is patch x patch latent pixels of one latent frame
    chunk: int = 3  # latent frames of a chunk
    first_chunk: int = 3  # latent frames of the first chunk; 1 lets a single image start a video
    eps: float = 1e-6
    attention_kernel: str = "auto"  # on GPUs: fa2 | cudnn | fa3 (a package of its own) | auto: the fastest we know
    # What backward recomputes: block | selective (a block except self-attention) | none | auto (selective, and nothing
    # in as many blocks as the memory planned for allows).
    checkpointing: str = "block"

    def validate(self) -> None:
        sizes = ("dim", "ffn_dim", "heads", "layers", "channels", "text_dim", "text_len", "freq_dim", "patch", "chunk")
        require_at_least(1, self, *sizes, "first_chunk")
        require_positive(self, "eps")
        require(self.dim % self.heads == 0, f"model.dim={self.dim} is not a multiple of model.heads={self.heads}")
        head = self.head_dim
        require(
            head % 2 == 0 and head >= 8,
            f"a head is {head} wide (model.dim / model.heads); it must be even and at least 8",
        )
        require(
            self.checkpointing in CHECKPOINTINGS,
            f"model.checkpointing={self.checkpointing!r}: choose one of {', '.join(CHECKPOINTINGS)}",
        )
        require(
            self.attention_kernel in KERNELS,
            f"model.attention_kernel={self.attention_kernel!r}: choose one of {', '.join(KERNELS)}",
        )
        require(self.freq_dim % 2 == 0, f"model.freq_dim={self.freq_dim} must be even")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def chunking(self) -> Chunking:
        return Chunking(self.chunk, self.first_chunk)

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels."""
        return (height // self.patch) * (width // self.patch)
