"""Tiny models of transformers with random weights, for the scores of eval.py."""

import torch
from helpers.pipelines import clip_tokenizer

SIDE = 32  # pixels that the tiny networks look at


def clip_model(folder):
    """A CLIP with its tokenizer of letters (16 tokens) and its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(layers, vocab_size=80, max_position_embeddings=16, hidden_act="gelu")
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(layers, image_size=SIDE, patch_size=8, hidden_act="gelu")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    wake(model)
    model.save_pretrained(folder)
    clip_tokenizer(folder).save_pretrained(folder)
    size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    with_name(CLIPImageProcessor, folder, size)
    return folder


def dino_model(folder):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    layers = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    model = Dinov2Model(Dinov2Config(patch_size=14, **layers))
    wake(model)
    model.save_pretrained(folder)
    size = dict(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    imagenet = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    with_name(BitImageProcessor, folder, size | imagenet)
    return folder


def wake(model):
    """Weights so large that different images and prompts get different features."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * 0.3)


def with_name(cls, folder, size):
    """Writes preprocessor_config.json as published folders have it."""
    import json

    options = dict(do_resize=True, do_center_crop=True, do_normalize=True, do_rescale=True)
    options |= dict(resample=3, image_processor_type=cls.__name__)
    options |= dict(
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(options | size))
