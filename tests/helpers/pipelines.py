"""Tiny teachers with random weights, in the formats of the real ones, as folders for --teacher.

A function for each, e.g. sd15(folder), writes the folder. The fixture `folders` calls each once.
"""

import json
import warnings

import diffusers
import pytest
import torch

# What scripts import for these folders. `scripts.load` imports them once for all scripts.
MODULES = [
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.dit.pipeline_dit",
    "transformers.models.clip.modeling_clip",
]


class Folders:
    """folders(name, **options) -> the folder of a tiny teacher, which is written at the first call.

    Tests share these folders: they copy one before they change it. cache: folder for the
    embeddings of prompts, for --cache-prompts.
    """

    def __init__(self, home):
        self.home = home
        self.cache = home / "cache"
        self.made = {}
        warnings.simplefilter("ignore")
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()

    def __call__(self, name, **options):
        key = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
        if key not in self.made:
            folder = self.home / key
            folder.mkdir(exist_ok=True)  # a function that skips its test leaves it
            self.made[key] = BUILDERS[name](folder, **options)
        return self.made[key]


def since(*version):
    """Skips the test if diffusers is older than what this pipeline needs (requirements.txt)."""
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < version:
        pytest.skip(
            f"diffusers {diffusers.__version__} is older than {'.'.join(map(str, version))}"
        )


def clip_tokenizer(folder):
    """A CLIP tokenizer of single letters: vocab.json and merges.txt in CLIP's format."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)] + list("0123456789")
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=16,
        pad_token="<|endoftext|>",
    )


def clip(size, hidden, projection=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=projection or hidden,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def kl_vae(channels=4, blocks=(8, 16), **kw):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=list(blocks),
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **kw,
    ).eval()


def sd15(folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=kl_vae(),
        text_encoder=clip(80, 16),
        tokenizer=clip_tokenizer(folder / "words"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder)


def sdxl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 24,
        norm_num_groups=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    tokens = clip_tokenizer(folder / "words")
    pipe = StableDiffusionXLPipeline(
        vae=kl_vae(),
        text_encoder=clip(80, 16),
        text_encoder_2=clip(80, 24, 24),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=scheduler,
    )
    return save(pipe, folder)


def sd3(folder):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=16,
    )
    tokens = clip_tokenizer(folder / "words")
    pipe = StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(80, 16, 16),
        tokenizer=tokens,
        text_encoder_2=clip(80, 24, 24),
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return save(pipe, folder)


def letter_tokenizer(**kw):
    """A fast tokenizer of single characters."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    words = [*special.values(), *(chr(c) for c in range(32, 127))]
    vocab = {word: i for i, word in enumerate(words)}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=t, **special, **kw)


def gemma2(layers=2):
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            head_dim=4,
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            vocab_size=110,
        )
    ).eval()


def sana(folder, **options):
    """options: of the network."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    net = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=16,
        **options,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=1,
    )
    pipe = SanaPipeline(
        tokenizer=letter_tokenizer(padding_side="right"),
        text_encoder=gemma2(layers=1),
        vae=vae,
        transformer=net,
        scheduler=scheduler,
    )
    return save(pipe, folder)


def sprint(folder):
    """A teacher of SANA-Sprint. SANA-1.5 has the norms, and times of 0..1000."""
    return sana(folder, qk_norm="rms_norm_across_heads", timestep_scale=0.001)


def t5(kind="T5", size=16, vocab=110):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab, d_model=size, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def flux(folder, pipeline="FluxPipeline"):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    if pipeline == "FluxKontextPipeline":
        notice_sources(net)
    pipe = getattr(diffusers, pipeline)(
        transformer=net,
        scheduler=scheduler,
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(80, 24),
        tokenizer=clip_tokenizer(folder / "words"),
        text_encoder_2=t5(),
        tokenizer_2=letter_tokenizer(),
    )
    return save(pipe, folder)


def chroma(folder):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    net = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=64,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    pipe = ChromaPipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=t5(),
        tokenizer=letter_tokenizer(),
    )
    return save(pipe, folder)


def notice_sources(net):
    """Random attention would not notice the tokens of a source image among those of the text."""
    for name, module in net.named_modules():
        if name.endswith("attn.norm_k"):
            module.weight.data *= 8
        if name.endswith(("attn.to_out.0", "proj_out")) and "blocks" in name:
            module.weight.data *= 8


def kontext(folder):
    return flux(folder, "FluxKontextPipeline")


def qwen3(size, layers, kind="Qwen3Model"):
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=110,
        head_dim=8,
    )
    return getattr(transformers, kind)(config).eval()


def chat_tokenizer(**kw):
    return letter_tokenizer(
        padding_side="right",
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
        **kw,
    )


def flux2_parts(text_width, guidance):
    """Network, scheduler and VAE of FLUX.2. The VAE's batch norm has statistics."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    net = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 2, 2),
    )
    # Random attention would not notice the prompt among the padding.
    for block in net.transformer_blocks:
        block.attn.norm_added_k.weight.data *= 8
        block.attn.to_out[0].weight.data *= 8
    vae = AutoencoderKLFlux2(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return dict(transformer=net, scheduler=scheduler, vae=vae)


def flux2(folder):
    since(0, 36)
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    parts = flux2_parts(text_width=48, guidance=True)
    text = dict(
        model_type="mistral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=31,  # the pipeline takes the outputs of 10, 20 and 30
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=110,
    )
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    ).eval()
    # The published folder has a processor, which needs torchvision; this is its tokenizer.
    tokens = letter_tokenizer(
        chat_template="{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
        "{{ part.text }}{% endfor %}{% endfor %}"
    )
    return save(Flux2Pipeline(text_encoder=encoder, tokenizer=tokens, **parts), folder)


def klein(folder):
    since(0, 37)
    from diffusers import Flux2KleinPipeline

    parts = flux2_parts(text_width=48, guidance=False)
    encoder = qwen3(16, 28, "Qwen3ForCausalLM")  # the pipeline takes the outputs of 9, 18 and 27
    return save(
        Flux2KleinPipeline(text_encoder=encoder, tokenizer=chat_tokenizer(), **parts), folder
    )


def lumina(folder):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )

    torch.manual_seed(0)
    net = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=8,
    )
    pipe = Lumina2Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        # its pipeline takes 8 pixels per latent for granted
        vae=kl_vae(blocks=(4, 4, 4, 8), shift_factor=0.1, scaling_factor=1.5),
        text_encoder=gemma2(),
        tokenizer=letter_tokenizer(padding_side="right"),
    )
    return save(pipe, folder)


def qwen2_vl(layers, tokens=None):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = dict(mrope_section=[1, 1, 2], rope_type="default", type="default")
    text = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=rope,
        rope_theta=1e6,
        vocab_size=110,
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    tokens = tokens or dict(
        vision_start_token_id=0,
        vision_end_token_id=0,
        vision_token_id=0,
        image_token_id=0,
        video_token_id=0,
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens, **text)
    ).eval()


def hunyuan(folder):
    since(0, 36)
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    net = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=24,
        rope_axes_dim=(4, 4),
    )
    # Random attention would not notice the prompt among the tokens of its template.
    for block in net.transformer_blocks:
        block.attn.norm_added_k.weight.data *= 8
        block.attn.add_v_proj.weight.data *= 8
        block.attn.to_out[0].weight.data *= 8
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.7,
    ).eval()
    letters = T5Config(vocab_size=384, d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = HunyuanImagePipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen2_vl(layers=3),  # the pipeline takes the output of the last but two
        tokenizer=letter_tokenizer(padding_side="right"),
        text_encoder_2=T5EncoderModel(letters).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
    return save(pipe, folder)


def qwen_parts(tokens=None, **network):
    """Parts of a pipeline of Qwen-Image. tokens: options of the text encoder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    net = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        **network,
    )
    # Random attention would not notice the few tokens of the prompt among those of the template.
    for block in net.transformer_blocks:
        block.attn.norm_added_k.weight.data *= 8
    encoder = qwen2_vl(1, tokens)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=4,
        max_image_seq_len=64,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
    )
    return dict(transformer=net, scheduler=scheduler, vae=vae, text_encoder=encoder)


def qwen(folder):
    since(0, 37)
    from diffusers import QwenImagePipeline

    tokenizer = letter_tokenizer(padding_side="right")
    return save(QwenImagePipeline(tokenizer=tokenizer, **qwen_parts()), folder)


def qwen_edit(folder, pipeline="QwenImageEditPipeline", **network):
    """The text encoder sees at most 2 x 2 tokens of a source."""
    since(0, 37)
    from transformers import Qwen2VLImageProcessor

    tokenizer = letter_tokenizer(padding_side="right")
    words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens(dict(additional_special_tokens=words))
    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(words)
    tokens = {f"{name}_token_id": i for name, i in zip(names, ids)}
    parts = qwen_parts(tokens, **network)
    notice_sources(parts["transformer"])
    pipe = getattr(diffusers, pipeline)(tokenizer=tokenizer, processor=None, **parts)
    save(pipe, folder)
    # The class of the processor needs torchvision.
    size = dict(shortest_edge=28**2, longest_edge=4 * 28**2)
    Qwen2VLImageProcessor(size=size).save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def qwen_plus(folder, **network):
    return qwen_edit(folder, "QwenImageEditPlusPipeline", **network)


def zimage(folder):
    since(0, 36)
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    net = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    text = qwen3(16, 2)
    pipe = ZImagePipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=text,
        tokenizer=chat_tokenizer(),
    )
    return save(pipe, folder)


def wan_network(channels, inputs=None, **kw):
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=inputs or channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **kw,
    )
    # Random attention would not notice the prompt among the zeros behind it.
    for block in net.blocks:
        block.attn2.norm_k.weight.data *= 8
    return net


def wan_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        scale_factor_spatial=4,
    ).eval()


def wan(folder, **kw):
    since(0, 37)
    from diffusers import UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(0)
    vae = wan_vae()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        transformer=wan_network(4),
        transformer_2=wan_network(4) if kw else None,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5("UMT5"),
        tokenizer=letter_tokenizer(),
        **kw,
    )
    return save(pipe, folder)


def wan_i2v(folder, experts=False):
    """Wan 2.1, which has an image encoder. experts: 2.2, which has none."""
    since(0, 37)
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    parts = wan_parts()
    if experts:
        nets = dict(transformer=wan_network(4, 12), transformer_2=wan_network(4, 12))
        return save(WanImageToVideoPipeline(boundary_ratio=0.9, **nets, **parts), folder)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    parts |= dict(
        transformer=wan_network(4, 12, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size=224, crop_size=224),
    )
    return save(WanImageToVideoPipeline(**parts), folder)


def wan_i2v22(folder):
    return wan_i2v(folder, experts=True)


def wan_parts():
    """VAE, scheduler, text encoder and tokenizer."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    text = dict(text_encoder=t5("UMT5"), tokenizer=letter_tokenizer())
    return dict(scheduler=scheduler, vae=wan_vae(), **text)


def wan22(folder):
    return wan(folder, boundary_ratio=0.875)


def wan5b(folder):
    """Wan 2.2 5B: 48 channels, a VAE of squares of pixels, a time for each token."""
    since(0, 37)
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=(0.2 * torch.randn(48, generator=generator)).tolist(),
        latents_std=(0.5 + torch.rand(48, generator=generator)).tolist(),
        scale_factor_spatial=8,
    ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipe = WanPipeline(
        transformer=wan_network(48),
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5("UMT5"),
        tokenizer=letter_tokenizer(),
        expand_timesteps=True,
    )
    return save(pipe, folder)


def sanavideo(folder):
    since(0, 36)
    from diffusers import (
        DPMSolverMultistepScheduler,
        SanaVideoPipeline,
        SanaVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    net = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.0,
        rope_max_seq_len=32,
    )
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=8.0,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=1,
    )
    pipe = SanaVideoPipeline(
        tokenizer=letter_tokenizer(padding_side="right"),
        text_encoder=gemma2(layers=1),
        vae=wan_vae(),
        transformer=net,
        scheduler=scheduler,
    )
    return save(pipe, folder)


def ltx(folder, **vae):
    """vae: further options of its VAE."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    net = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    # Random attention would not notice the prompt.
    for block in net.transformer_blocks:
        block.attn2.norm_k.weight.data *= 8
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        scaling_factor=1.5,
        **vae,
    ).eval()
    vae.latents_mean.normal_(0, 0.2)
    vae.latents_std.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=4,
        max_image_seq_len=128,
        base_shift=0.95,
        max_shift=2.05,
        shift_terminal=0.1,
    )
    pipe = LTXPipeline(
        transformer=net,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5(),
        tokenizer=letter_tokenizer(),
    )
    return save(pipe, folder)


def hunyuanvideo(folder):
    since(0, 36)
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    torch.manual_seed(0)
    net = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 2, 2),
    )
    # Random attention would not notice the prompt.
    for block in net.transformer_blocks:
        block.attn.norm_added_k.weight.data *= 8
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
    text = Qwen2_5_VLTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,  # the pipeline takes the output of the last but two
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=dict(mrope_section=[1, 1, 2], rope_type="default", type="default"),
        rope_theta=1e6,
        vocab_size=110,
    )
    # The pipeline drops the first 108 tokens, those of its template.
    tokens = letter_tokenizer(
        padding_side="right", chat_template="{{ 'x' * 108 }}{{ messages[1].content }}"
    )
    letters = t5(size=8, vocab=384)
    pipe = HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(text).eval(),
        tokenizer=tokens,
        transformer=net,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=letters,
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    return save(pipe, folder)


def save(pipe, folder):
    for name in ("unet", "transformer", "transformer_2"):
        net = getattr(pipe, name, None)
        if net is not None:
            wake_zero_layers(net)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def wake_zero_layers(net):
    """Layers that start at zero would hide mistakes."""
    for p in net.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, 0, 0.05)


def dit(folder):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    return save(
        DiTPipeline(
            transformer=net, vae=kl_vae(), scheduler=scheduler, id2label={"0": "tench, Tinca tinca"}
        ),
        folder,
    )


def sit_weights(
    width=32, depth=2, channels=4, out=8, patch=2, side=8, classes=10, projectors=False, seed=0
):
    """Random tensors with the names and shapes of SiT's published checkpoints."""
    g = torch.Generator().manual_seed(seed)

    def linear(name, rows, columns):
        weight = torch.randn(rows, columns, generator=g) * 0.5 / columns**0.5
        bias = torch.randn(rows, generator=g) * 0.1
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    tensors = linear("t_embedder.mlp.0", width, 256)
    tensors |= linear("t_embedder.mlp.2", width, width)
    tensors |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    tensors |= linear("final_layer.linear", patch**2 * out, width)
    tensors["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=g)
    tensors |= linear("x_embedder.proj", width, channels * patch**2)
    patches = tensors["x_embedder.proj.weight"]  # of a convolution
    tensors["x_embedder.proj.weight"] = patches.view(width, channels, patch, patch)
    for i in range(depth):
        tensors |= linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        tensors |= linear(f"blocks.{i}.attn.proj", width, width)
        tensors |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
        tensors |= linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        tensors |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    if projectors:
        tensors |= linear("projectors.0.0", width, width)
    tensors["pos_embed"] = sit_positions(width, side // patch)
    return tensors


def sit_positions(width, n):
    """[1, n n, width]: sines and cosines of the column in one half, of the row in the other."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(p):
        phase = p.flatten()[:, None] * omega
        return torch.cat([phase.sin(), phase.cos()], 1)

    row, column = torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 2, indexing="ij")
    return torch.cat([waves(column), waves(row)], 1)[None].float()


def sit(folder, **kw):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sit_weights(**kw), folder / "sit.pt")
    torch.manual_seed(1)
    kl_vae().save_pretrained(folder / "vae")
    (folder / "teacher.json").write_text(
        json.dumps({"model": {"adapter": "sit", "weights": "sit.pt", "heads": 2}})
    )
    return folder


def edm(folder, null=False, **changes):
    """null: with a row for the null label. changes: of "model" in teacher.json."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        num_class_embeds=10 + null,
        block_out_channels=(16, 32),
        attention_head_dim=8,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        upsample_type="resnet",
        downsample_type="resnet",
    )
    net.save_pretrained(folder, safe_serialization=True)
    model = dict(
        adapter="edm",
        schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
        prediction="edm",
        shape=[3, 8, 8],
        classes=10,
        sigma_data=0.5,
        time_scale=1000,
    )
    (folder / "teacher.json").write_text(json.dumps(dict(model=model | changes)))
    return folder


BUILDERS = dict(
    sd15=sd15,
    sdxl=sdxl,
    sd3=sd3,
    sana=sana,
    sprint=sprint,
    flux=flux,
    chroma=chroma,
    kontext=kontext,
    flux2=flux2,
    klein=klein,
    hunyuan=hunyuan,
    lumina=lumina,
    qwen=qwen,
    qwen_edit=qwen_edit,
    qwen_plus=qwen_plus,
    zimage=zimage,
    wan=wan,
    wan22=wan22,
    wan_i2v=wan_i2v,
    wan_i2v22=wan_i2v22,
    wan5b=wan5b,
    sanavideo=sanavideo,
    ltx=ltx,
    hunyuanvideo=hunyuanvideo,
    dit=dit,
    sit=sit,
    edm=edm,
)
