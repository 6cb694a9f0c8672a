"""A random Qwen-Image pipeline of the real classes, as small as it gets, and a tokenizer in the manner of Qwen's."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from crd.nano.world import captions_vocabulary

#: one token each, as with the real tokenizer: the pipeline counts 34 of them in front of the prompt
TEMPLATE = (
    "system user assistant Describe the image by detailing color shape size texture quantity text spatial relationships "
    "of objects and background , : \n"
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Words, line ends, punctuation and capital letters; Qwen's special tokens and a chat template."""
    words = dict.fromkeys([*TEMPLATE.split(" "), '"', *captions_vocabulary()])
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pieces = Regex(r"\n|[a-z]+|Describe|[A-Z]|[0-9]+|[^\sa-zA-Z0-9]")
    tokenizer.pre_tokenizer = Split(pieces, "removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=1100,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT
    return fast


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = make_qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.3, -0.5, 0.1, 0.9],
        latents_std=[0.5, 1.5, 1.0, 2.0],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
