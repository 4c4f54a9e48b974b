"""What each value of a pipeline's configuration files does here: the list behind the table in
docs/teachers.md. tests/test_configurations.py proves every entry against diffusers.

honoured    the pipeline computes something else with this value, and so do we
refused     one line names the key before anything is loaded
no effect   the network is evaluated as without it: the pipeline ignores the key, or it belongs to
            the pipeline's solver, in whose place our samplers have a grid of their own
"""

import json
from dataclasses import dataclass, field

PIPELINES = ["sd15", "sdxl", "sd3", "sana", "flux", "qwen", "zimage", "wan", "dit"]
TITLES = dict(
    sd15="SD 1.x, 2.x",
    sdxl="SDXL",
    sd3="SD3",
    sana="SANA",
    flux="FLUX",
    qwen="Qwen-Image",
    zimage="Z-Image",
    wan="Wan",
    dit="DiT",
)
VP = ["sd15", "sdxl", "dit"]
EULER_FLOW = ["sd3", "flux", "qwen", "zimage"]  # FlowMatchEulerDiscreteScheduler
MULTISTEP_FLOW = ["sana", "wan"]  # DPMSolverMultistepScheduler and UniPCMultistepScheduler
FLOW = EULER_FLOW + MULTISTEP_FLOW

SOLVER = "solver"  # reasons that many rows share
UNUSED = "not read by this pipeline"


@dataclass
class Row:
    """One value of one key. honoured, refused, none: pipelines; why: for the reader of the table.

    kind: class of the scheduler, where it is not the one of the tiny pipeline. also: further values
    in the same file. w: guidance of the comparison. named: the key that a refusal names, where it
    is another one.
    """

    part: str  # index, scheduler, vae, or network
    key: str
    value: object
    honoured: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    none: list = field(default_factory=list)
    why: str = ""
    kind: str = None
    also: dict = field(default_factory=dict)
    w: float = 3.0
    named: str = None

    def cases(self):
        """(pipeline, verdict) of this row."""
        for verdict, names in (
            ("honoured", self.honoured),
            ("refused", self.refused),
            ("no effect", self.none),
        ):
            for name in names:
                yield name, verdict


def scheduler(key, value, **options):
    return Row("scheduler", key, value, **options)


def network(key, value, **options):
    return Row("network", key, value, **options)


def vae(key, value, **options):
    return Row("vae", key, value, **options)


def index(key, value, **options):
    return Row("index", key, value, **options)


def zero_snr(kind=None):
    """A fine-tune that ends in pure noise, as they are published. kind: class of its scheduler."""
    also = dict(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    return scheduler("rescale_betas_zero_snr", True, kind=kind, also=also)


V = dict(prediction_type="v_prediction")
DPM = "DPMSolverMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"
EULER = "EulerDiscreteScheduler"
DDIM = "DDIMScheduler"

ROWS = [
    # ---- noise levels of DDPM
    scheduler("num_train_timesteps", 500, honoured=VP, refused=FLOW),
    scheduler("beta_start", 0.002, honoured=VP, none=["sana", "wan"], why="flow sigmas"),
    scheduler("beta_end", 0.015, honoured=VP, none=["sana", "wan"], why="flow sigmas"),
    scheduler("beta_schedule", "linear", honoured=["sd15", "sdxl"]),
    scheduler("beta_schedule", "scaled_linear", honoured=["dit"]),
    scheduler("beta_schedule", "squaredcos_cap_v2", refused=VP),
    scheduler("trained_betas", [0.1, 0.2], refused=VP, also=dict(num_train_timesteps=2)),
    scheduler("prediction_type", "v_prediction", honoured=VP, refused=["sana", "wan"]),
    scheduler("prediction_type", "sample", honoured=VP),
    scheduler("prediction_type", "flow_prediction", refused=["sdxl"], kind=DPM),
    scheduler("rescale_betas_zero_snr", True, honoured=VP, also=V),
    scheduler("rescale_betas_zero_snr", True, refused=VP, why="with prediction_type epsilon"),
    scheduler("timestep_type", "continuous", refused=["sdxl"]),
    scheduler("variance_type", "learned_range", refused=["sd15"], kind="DDPMScheduler"),
    scheduler("variance_type", "fixed_large", none=["sd15"], kind="DDPMScheduler", why=SOLVER),
    # ---- classes with the same levels
    scheduler(
        "_class_name",
        "PNDMScheduler",
        none=["sd15", "sdxl"],
        also=dict(skip_prk_steps=True),
        why=SOLVER,
    ),
    scheduler("_class_name", "LMSDiscreteScheduler", none=["sd15", "sdxl"], why=SOLVER),
    scheduler("_class_name", "EulerAncestralDiscreteScheduler", none=["sdxl"], why=SOLVER),
    scheduler("_class_name", "LCMScheduler", none=["sd15", "sdxl"], why=SOLVER),
    scheduler(
        "_class_name",
        "DDPMScheduler",
        none=["sd15", "sdxl"],
        also=dict(clip_sample=False),
        why=SOLVER,
    ),
    scheduler("_class_name", DPM, none=["sd15", "sdxl", "dit"], why=SOLVER),
    scheduler("_class_name", UNIPC, none=["sd15", "sdxl"], why=SOLVER),
    scheduler(
        "_class_name",
        "EDMEulerScheduler",
        refused=["sdxl"],
        also=dict(sigma_min=0.002, sigma_max=80),
    ),
    scheduler("_class_name", "FlowMatchEulerDiscreteScheduler", refused=VP),
    scheduler("_class_name", DDIM, refused=["sd3", "flux", "wan"]),
    # ---- clipping of the estimate
    scheduler("thresholding", True, refused=["sd15", "dit", "sana", "wan"]),
    scheduler("clip_sample", True, none=["sd15"], why="its pipeline sets it to false"),
    scheduler("clip_sample", True, refused=["sdxl", "dit"], kind=DDIM),
    scheduler("clip_sample_range", 2.0, none=["sd15", "dit"], why="of clip_sample"),
    scheduler("sample_max_value", 2.0, none=["sd15", "dit", "sana", "wan"], why="of thresholding"),
    scheduler("dynamic_thresholding_ratio", 0.9, none=["sd15", "dit"], why="of thresholding"),
    # ---- steps of the solver
    scheduler("set_alpha_to_one", True, none=["sd15"], why=SOLVER),
    scheduler("steps_offset", 3, none=["sd15", "sdxl"], why=SOLVER),
    scheduler("timestep_spacing", "trailing", none=["sd15", "sdxl", "dit"], why=SOLVER),
    scheduler("timestep_spacing", "linspace", none=["sd15", "sdxl"], why=SOLVER),
    scheduler("skip_prk_steps", True, none=["sd15"], kind="PNDMScheduler", why=SOLVER),
    scheduler("original_inference_steps", 40, none=["sd15"], kind="LCMScheduler", why=SOLVER),
    scheduler("timestep_scaling", 5.0, none=["sd15"], kind="LCMScheduler", why=SOLVER),
    scheduler("interpolation_type", "log_linear", none=["sdxl"], why=SOLVER),
    scheduler("final_sigmas_type", "sigma_min", none=["sdxl", "sana"], why=SOLVER),
    scheduler("use_karras_sigmas", True, none=["sdxl", *EULER_FLOW], why=SOLVER),
    scheduler("use_exponential_sigmas", True, none=["sdxl", "sd3", "flux"], why=SOLVER),
    scheduler("use_beta_sigmas", True, none=["sdxl", "sd3", "flux"], why=SOLVER),
    scheduler(
        "sigma_min", 0.1, none=["sdxl"], also=dict(use_karras_sigmas=True, sigma_max=9), why=SOLVER
    ),
    scheduler(
        "sigma_max",
        9.0,
        none=["sdxl"],
        also=dict(use_karras_sigmas=True, sigma_min=0.1),
        why=SOLVER,
    ),
    scheduler("solver_order", 2, none=["sana"], why=SOLVER),
    scheduler("solver_order", 1, none=["wan"], why=SOLVER),
    scheduler("solver_type", "heun", none=["sana"], also=dict(solver_order=2), why=SOLVER),
    scheduler("algorithm_type", "sde-dpmsolver++", none=["sana"], why=SOLVER),
    scheduler("lower_order_final", False, none=["sana"], why=SOLVER),
    scheduler("euler_at_final", True, none=["sana"], why=SOLVER),
    scheduler("use_lu_lambdas", True, none=["sdxl"], kind=DPM, why=SOLVER),
    scheduler("lambda_min_clipped", -3.0, none=["sdxl"], kind=DPM, why=SOLVER),
    scheduler("disable_corrector", [0], none=["wan"], why=SOLVER),
    # ---- time shift of flows
    scheduler("shift", 2.0, honoured=["sd3", "zimage"], none=["flux", "qwen"], why="dynamic shift"),
    scheduler("shift", 2.0, honoured=["flux", "qwen"], also=dict(use_dynamic_shifting=False)),
    scheduler("shift", 2.0, none=["sana", "wan"], why="its scheduler has flow_shift"),
    scheduler("flow_shift", 2.0, honoured=["sana", "wan"]),
    scheduler("flow_shift", 2.0, none=["sd3", "zimage", "sdxl"], why="its scheduler has none"),
    scheduler("use_dynamic_shifting", True, honoured=["sd3", "zimage"]),
    scheduler("use_dynamic_shifting", True, refused=["sana", "wan"]),
    scheduler("base_shift", 0.8, honoured=["flux", "qwen"]),
    scheduler("max_shift", 1.4, honoured=["flux", "qwen"]),
    scheduler("base_image_seq_len", 8, honoured=["flux", "qwen"]),
    scheduler("max_image_seq_len", 80, honoured=["flux", "qwen"]),
    scheduler("base_shift", 0.8, none=["sd3"], why="of dynamic shifting"),
    scheduler("time_shift_type", "linear", honoured=["flux", "qwen"]),
    scheduler("time_shift_type", "linear", none=["sd3"], why="of dynamic shifting"),
    scheduler("shift_terminal", 0.1, none=["flux", "qwen"], why=SOLVER),
    scheduler("stochastic_sampling", True, none=["sd3"], why=SOLVER),
    scheduler("invert_sigmas", True, refused=EULER_FLOW),
    scheduler("use_flow_sigmas", False, refused=["sana", "wan"]),
    scheduler("use_flow_sigmas", True, refused=["sdxl"], kind=DPM),
    scheduler("_class_name", "FlowMatchHeunDiscreteScheduler", none=["sd3"], why=SOLVER),
    scheduler(
        "_class_name",
        UNIPC,
        honoured=["sd3"],
        also=dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0),
    ),
    scheduler("_class_name", "FlowMatchEulerDiscreteScheduler", honoured=["wan"]),
    # ---- the VAE
    vae("scaling_factor", 0.5, honoured=["sd15", "sdxl", "sd3", "sana", "flux", "zimage", "dit"]),
    vae("shift_factor", 0.3, honoured=["sd3", "flux", "zimage"]),
    vae("shift_factor", 0.3, none=["sd15", "sdxl", "dit"], why=UNUSED),
    vae(
        "latents_mean",
        [0.1, -0.2, 0.3, 0.5],
        honoured=["sdxl"],
        none=["sd15", "sd3", "flux", "zimage", "dit"],
        also=dict(latents_std=[1.5, 0.7, 1.0, 2.0]),
        why=UNUSED,
    ),
    vae("latents_mean", [0.1, -0.2, 0.3, 0.5], none=["sdxl"], why="without latents_std"),
    vae("latents_mean", [0.5, -0.2, 0.3, 0.1], honoured=["qwen", "wan"]),
    vae("latents_std", [1.5, 0.7, 1.0, 3.0], honoured=["qwen", "wan"]),
    vae("latents_std", [1.5, 0.7, 1.0, 2.0], none=["sdxl"], why="without latents_mean"),
    vae("force_upcast", False, none=["sd15", "sdxl", "sd3"], why="for fp16, which is not used"),
    vae("latent_channels", 8, refused=["sd15", "sdxl", "flux", "sana"], named="in_channels"),
    vae("z_dim", 8, refused=["qwen", "wan"], named="in_channels"),
    vae("in_channels", 4, refused=["sd15", "sana", "wan"], also=dict(out_channels=4)),
    vae("input_channels", 4, refused=["qwen"]),
    vae("use_quant_conv", False, honoured=["sd15", "sd3"], also=dict(use_post_quant_conv=False)),
    vae(
        "block_out_channels",
        [8, 8, 16],
        honoured=["sd15", "sdxl", "sd3", "flux", "dit"],
        also=dict(
            down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3
        ),
        why="8 times fewer latents than pixels along a side, or 4 times",
    ),
    vae(
        "temperal_downsample",
        [False, True],
        honoured=["qwen"],
        also=dict(dim_mult=[1, 1, 1]),
    ),
    vae(
        "patch_size",
        2,
        honoured=["wan"],
        also=dict(in_channels=12, out_channels=12, is_residual=True, scale_factor_spatial=8),
        why="Wan 2.2 5B",
    ),
    vae(
        "scale_factor_temporal",
        2,
        honoured=["wan"],
        also=dict(temperal_downsample=[False, True]),
    ),
    vae("sample_size", 64, none=["sd15", "sdxl", "sd3"], why=UNUSED),
    # ---- the network
    network("sample_size", 4, honoured=["sd15", "sdxl", "sd3", "dit"]),
    network("sample_size", 32, honoured=["sana"]),
    network("sample_size", [8, 4], honoured=["sd15"]),
    network("sample_size", None, refused=["sd15", "sdxl"], named="--size", why="give --size"),
    network("patch_size", 1, honoured=["sd3", "dit"]),
    network("patch_size", 2, honoured=["sana"]),
    network("patch_size", [1, 1, 1], honoured=["wan"]),
    network("pos_embed_max_size", 12, honoured=["sd3"]),
    network("in_channels", 9, refused=["sd15", "sdxl"]),
    network("in_channels", 8, refused=["sd3", "sana", "zimage", "wan", "dit"]),
    network("in_channels", 32, refused=["flux", "qwen"]),
    network("out_channels", 8, refused=["sd15", "sdxl", "sd3", "qwen", "wan", "flux"]),
    network("out_channels", 8, honoured=["sana"], why="half is a learned variance"),
    network("out_channels", 4, honoured=["dit"], why="no learned variance"),
    network("time_cond_proj_dim", 16, refused=["sd15", "sdxl"], why="guidance scale of LCM"),
    network("class_embed_type", "timestep", refused=["sd15", "sdxl"]),
    network("num_class_embeds", 10, refused=["sd15", "sdxl"]),
    network("encoder_hid_dim_type", "text_proj", honoured=["sd15"], also=dict(encoder_hid_dim=16)),
    network(
        "encoder_hid_dim_type",
        "image_proj",
        refused=["sd15", "sdxl"],
        also=dict(encoder_hid_dim=16),
    ),
    network(
        "addition_embed_type", "text", honoured=["sd15"], also=dict(addition_embed_type_num_heads=2)
    ),
    network("addition_embed_type", "image", refused=["sd15", "sdxl"]),
    network("mid_block_type", None, honoured=["sd15", "sdxl"]),
    network("flip_sin_to_cos", False, honoured=["sd15", "sdxl"]),
    network("freq_shift", 1, honoured=["sd15"]),
    network("center_input_sample", True, honoured=["sd15"]),
    network("time_embedding_type", "fourier", honoured=["sd15"]),
    network("time_embedding_dim", 24, honoured=["sd15"]),
    network("timestep_post_act", "silu", honoured=["sd15"]),
    network("time_embedding_act_fn", "silu", honoured=["sd15"]),
    network("upcast_attention", True, none=["sd15"], why="for fp16, which is not used"),
    network(
        "addition_time_embed_dim",
        4,
        honoured=["sdxl"],
        also=dict(projection_class_embeddings_input_dim=6 * 4 + 24),
    ),
    network("guidance_embeds", False, honoured=["flux"]),
    network("guidance_embeds", True, refused=["sana", "qwen"]),
    network("timestep_scale", 0.001, honoured=["sana"]),
    network("zero_cond_t", True, refused=["qwen"]),
    network("use_additional_t_cond", True, refused=["qwen"]),
    network("use_layer3d_rope", True, refused=["qwen"]),
    network("siglip_feat_dim", 16, refused=["zimage"]),
    network("all_patch_size", [1], refused=["zimage"]),
    network("all_f_patch_size", [2], refused=["zimage"]),
    network("t_scale", 500.0, honoured=["zimage"]),
    network("image_dim", 16, none=["wan"], why="text to video gives no image"),
    network(
        "num_embeds_ada_norm",
        1001,
        honoured=["dit"],
        w=1.0,
        why="the null label is the last; its pipeline has 1000 for all",
    ),
    network("quantization_config", dict(load_in_4bit=True), refused=PIPELINES),
    # ---- model_index.json
    index("force_zeros_for_empty_prompt", False, honoured=["sdxl"]),
    index("add_watermarker", False, none=["sdxl"], why="written into finished images"),
    index("requires_safety_checker", True, none=["sd15"], why="judges finished images"),
    index("expand_timesteps", True, none=["wan"], why="all tokens have the same time"),
    index("id2label", {"0": "fish"}, none=["dit"], why="names for people"),
    index("boundary_ratio", 0.5, honoured=["wan"]),
]

# Keys that only the constructors of diffusers read. It builds the network, the VAE or the scheduler
# from them, ours as the pipeline's.
BUILT = dict(
    network="""
        act_fn activation_fn added_kv_proj_dim addition_embed_type_num_heads attention_bias
        attention_head_dim attention_type axes_dims axes_dims_rope axes_lens block_out_channels
        cap_feat_dim caption_channels caption_projection_dim class_embeddings_concat conv_in_kernel
        conv_out_kernel cross_attention_dim cross_attention_head_dim cross_attention_norm
        cross_attn_norm dim down_block_types downsample_padding dropout dual_attention_layers
        dual_cross_attention encoder_hid_dim eps ffn_dim freq_dim guidance_embeds_scale
        interpolation_scale joint_attention_dim layers_per_block mid_block_only_cross_attention
        mid_block_scale_factor mlp_ratio n_heads n_kv_heads n_layers n_refiner_layers
        norm_elementwise_affine norm_eps norm_num_groups norm_type num_attention_heads
        num_cross_attention_heads num_layers num_single_layers only_cross_attention
        pooled_projection_dim pos_embed_seq_len projection_class_embeddings_input_dim qk_norm
        resnet_out_scale_factor resnet_skip_time_act resnet_time_scale_shift
        reverse_transformer_layers_per_block rope_max_seq_len rope_theta text_dim
        transformer_layers_per_block up_block_types use_linear_projection
    """.split(),
    vae="""
        act_fn attention_head_dim attn_scales base_dim decoder_act_fns decoder_base_dim
        decoder_block_out_channels decoder_block_types decoder_conv_act_fn decoder_in_shortcut
        decoder_layers_per_block decoder_norm_types decoder_qkv_multiscales dim_mult
        down_block_types downsample_block_type dropout encoder_block_out_channels
        encoder_block_types encoder_layers_per_block encoder_out_shortcut encoder_qkv_multiscales
        is_residual layers_per_block mid_block_add_attention norm_num_groups num_res_blocks
        scale_factor_spatial up_block_types upsample_block_type use_post_quant_conv
    """.split(),
    scheduler=["predict_x0", "solver_p"],  # of the solver UniPC
    index=[],
)


# ---- the table -----------------------------------------------------------------------------------


def table():
    """Lines of the table in docs/teachers.md."""
    titles = [TITLES[name] for name in PIPELINES]
    lines = [f"| value | {' | '.join(titles)} | |", "|---" * (len(titles) + 2) + "|"]
    for part in ("scheduler", "vae", "network", "index"):
        lines.append(f"| **{PARTS[part]}** |" + " |" * (len(titles) + 1))
        lines += [line(row) for row in ROWS if row.part == part]
    return lines


PARTS = dict(
    scheduler="scheduler/scheduler_config.json",
    vae="vae/config.json",
    network="unet/config.json, transformer/config.json",
    index="model_index.json",
)


def line(row):
    cells = [f"{row.key} {words(row.value)}"]
    verdicts = dict(row.cases())
    cells += [verdicts.get(name, "") for name in PIPELINES]
    notes = [row.why] if row.why else []
    if row.kind:
        notes.append(f"in {row.kind}")
    if row.also:
        notes.append("with " + ", ".join(f"{k} {words(v)}" for k, v in row.also.items()))
    return f"| {' | '.join(cells)} | {'; '.join(notes)} |"


def words(value):
    return "`" + (value if isinstance(value, str) else json.dumps(value)) + "`"


if __name__ == "__main__":
    print(*table(), sep="\n")
