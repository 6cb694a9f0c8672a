"""Tiny models of the classes and file formats of the preference rewards: random weights, real tokenizers; and the forward
passes of their references in plain torch, under the references' names of weights."""

import json
import string

import torch
from torch import nn
from torch.nn import functional
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

LENGTH = 12  # tokens
SIZE = 8  # pixels of a side
PATCH = 4


def clip_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase + string.digits
    words = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", "do", "dog</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)


def bert_tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "very", "##s"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def save_clip(folder, seed=0):
    """A CLIPModel of ViT kind with tokenizer and image processor, as PickScore, CLIPScore and the aesthetic reward load them."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": SIZE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=8))
    for weight in model.parameters():  # larger than the defaults, so that pictures and prompts matter
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def layered_head(inputs: int) -> nn.Sequential:
    """The head of LAION's predictor and of ImageReward: linear layers and dropout only."""
    return nn.Sequential(
        nn.Linear(inputs, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()


class Block(nn.Module):
    """open_clip's residual block: fused queries, keys and values; GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, layers, size, patch, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """A vision transformer CLIP with open_clip's names of weights."""

    def __init__(self, vision=(32, 16, 2), text=(16, 16, 2), size=SIZE, patch=PATCH, out=8, vocabulary=78, length=LENGTH):
        super().__init__()
        self.visual = Visual(*vision, size, patch, out)
        self.transformer = Tower(*text)
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.randn(length, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.randn(text[0], out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, ids):
        """(n, length) ids, the end of text being the highest of all, zeros behind it."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def shake(model: nn.Module) -> nn.Module:
    """Norms and biases too get values that matter."""
    for weight in model.parameters():
        nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.3)
    return model.eval()


class ViTBlock(nn.Module):
    """timm's block, as in BLIP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](attend(q, k, v, self.heads))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


def attend(q, k, v, heads, allowed=None):
    """Multi-head attention written out, one head at a time; ``allowed`` is (n, keys)."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = a @ b.mT / a.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        parts.append(scores.softmax(-1) @ c)
    return torch.cat(parts, -1)


class ViT(nn.Module):
    def __init__(self, width, heads, layers, size, patch):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), self.patch_embed["proj"](pixels).flatten(2).mT], 1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    """BERT's attention with its residual and norm."""

    def __init__(self, width, heads, source):
        super().__init__()
        self.heads = heads
        sizes = {"query": width, "key": source, "value": source}
        self.self = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sizes.items()})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, source, allowed=None):
        y = attend(self.self["query"](x), self.self["key"](source), self.self["value"](source), self.heads, allowed)
        return self.output["LayerNorm"](self.output["dense"](y) + x)


class BertLayer(nn.Module):
    def __init__(self, width, heads, vision_width):
        super().__init__()
        self.attention, self.crossattention = Attention(width, heads, width), Attention(width, heads, vision_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, allowed, pictures):
        x = self.crossattention(self.attention(x, x, allowed), pictures)
        return self.output["LayerNorm"](self.output["dense"](functional.gelu(self.intermediate["dense"](x))) + x)


class Bert(nn.Module):
    def __init__(self, width, heads, layers, vision_width, vocabulary, length):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(length, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(length)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(width, heads, vision_width) for _ in range(layers))})

    def forward(self, ids, allowed, pictures):
        places = self.embeddings.position_ids[:, : ids.shape[1]]
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](places)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, allowed, pictures)
        return x


class ReferenceImageReward(nn.Module):
    """ImageReward with its own names of weights."""

    def __init__(self, vision=(32, 16, 2), text=(12, 3, 2), size=SIZE, patch=PATCH, vocabulary=16, length=40):
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": ViT(*vision, size, patch),
                "text_encoder": Bert(*text, vision[0], vocabulary, length),
                "vision_proj": nn.Linear(vision[0], 4),  # of BLIP's pretraining, unused
                "text_proj": nn.Linear(text[0], 4),
            }
        )
        self.mlp = nn.ModuleDict({"layers": layered_head(text[0])})

    def forward(self, pixels, ids, allowed):
        hidden = self.blip["text_encoder"](ids, allowed, self.blip["visual_encoder"](pixels))
        return (self.mlp["layers"](hidden[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def med_config(width=12, heads=3, layers=2, vocabulary=16, length=40) -> dict:
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": length,
        "model_type": "bert",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "vocab_size": vocabulary,
        "encoder_width": width,  # not the vision tower's, as in the published file
        "add_cross_attention": True,
    }


def save_imagereward(folder, seed=0) -> ReferenceImageReward:
    """ImageReward.pt, med_config.json and a tokenizer; returns the model whose weights they are."""
    torch.manual_seed(seed)
    model = shake(ReferenceImageReward())
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med_config()))
    bert_tokenizer().save_pretrained(folder)
    return model


def save_hpsv2(folder, seed=0) -> OpenCLIP:
    """HPS_v2.1_compressed.pt and a tokenizer; returns the model whose weights they are."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    model = shake(OpenCLIP(vocabulary=len(tokenizer)))
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "HPS_v2.1_compressed.pt")
    tokenizer.save_pretrained(folder)
    return model
