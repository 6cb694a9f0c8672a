"""The parts of the embedded base model: tokenizer, text encoders, transformer, and their assembly.

They are the classes that Stable Diffusion 3 is made of, only small, so that everything which works on
the nano model works on the real one. In the place of T5 there is a silent one, see :func:`make_silent_t5`.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from crd.nano.world import captions_vocabulary

MAX_TOKENS = 16
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the captions and for each capital letter; anything else is ``<unk>``."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *captions_vocabulary()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"[A-Z]|[^\w]"), "isolated")])
    special = [(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def make_silent_tokenizer() -> PreTrainedTokenizerFast:
    """For the silent T5: every prompt is no token at all, so that none is ever reported as cut off."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = Replace(Regex(r"[\s\S]"), "")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def make_text_encoder(tokenizer: PreTrainedTokenizerFast, width: int = 64, layers: int = 2) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_silent_t5(width: int) -> T5EncoderModel:
    """A T5 of one small layer whose output is exactly zero, for its final norm is.

    The model has no use for T5, but diffusers loads no SD3 pipeline that lacks one unless it is told so.
    These zeros are those that the pipeline itself puts in the place of a T5 that it was told to do without.
    """
    config = T5Config(vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def make_transformer(width: int = 128, layers: int = 6, text_width: int = 128) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


@dataclass(frozen=True)
class NanoParts:
    """What pretraining trains together: the transformer and the two text encoders."""

    tokenizer: PreTrainedTokenizerFast
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    transformer: SD3Transformer2DModel

    @classmethod
    def make(cls) -> "NanoParts":
        tokenizer = make_tokenizer()
        return cls(tokenizer, make_text_encoder(tokenizer), make_text_encoder(tokenizer), make_transformer())

    def modules(self) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict(
            {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2, "transformer": self.transformer}
        )

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=make_silent_t5(self.transformer.config.joint_attention_dim),
            tokenizer_3=make_silent_tokenizer(),
        )
