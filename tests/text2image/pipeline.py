"""A Stable Diffusion 3 pipeline of small random parts, built without a network connection.

``python tests/text2image/pipeline.py DIR`` writes it: 16x16 images, six blocks of width 32, all
three text encoders, tokenizers that know letters.
"""

import string
import sys
from pathlib import Path
from typing import Any

import torch

WIDTH = 32  # of the text encoders
LETTERS = string.ascii_lowercase + string.digits + string.punctuation


def clip_tokenizer() -> Any:
    """One token a letter, and one a letter that ends a word."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_encoder(layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = len(clip_tokenizer())
    options = dict(hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH)
    options |= dict(num_hidden_layers=layers, num_attention_heads=2, vocab_size=size)
    options |= dict(bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    return CLIPTextModelWithProjection(CLIPTextConfig(**options))


def t5() -> tuple[Any, Any]:
    """Encoder and tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=pieces + [(letter, -3.0) for letter in LETTERS], extra_ids=0)
    options = dict(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH)
    return T5EncoderModel(T5Config(**options, num_layers=1, num_heads=2)), tokenizer


def transformer(blocks: int = 6, heads: int = 2, seed: int = 0, **changes: Any) -> Any:
    """An SD3 transformer of width 16 times its heads, whose guided and weak velocities differ."""
    from diffusers import SD3Transformer2DModel

    options = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=blocks)
    options |= dict(attention_head_dim=16, num_attention_heads=heads, joint_attention_dim=2 * WIDTH)
    options |= dict(caption_projection_dim=16 * heads, pooled_projection_dim=2 * WIDTH)
    torch.manual_seed(seed)
    network = SD3Transformer2DModel(**options | dict(pos_embed_max_size=8) | changes)
    for block in network.transformer_blocks:  # gates that are open: each block matters
        block.norm1.linear.weight.data *= 4
    return network.eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    options = dict(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4)
    options |= dict(down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1)
    options |= dict(up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16)
    options |= dict(shift_factor=0.0609, scaling_factor=1.5305)
    return AutoencoderKL(**options, use_quant_conv=False, use_post_quant_conv=False).eval()


def make(folder: str | Path, seed: int = 0) -> Path:
    """Write the pipeline; less than 2 MB.

    Args:
        folder: Of the pipeline; made if it is not there.
        seed: Of the weights.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    text_encoder_3, tokenizer_3 = t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_encoder(2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(3),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    make(sys.argv[1])
