"""SANA-Video: SANA's linear attention on the latents of Wan 2.1's autoencoder."""

from common.teachers.configuration import FLOW_SCHEDULER
from common.teachers.flow import Sana
from common.teachers.video import Video


class SanaVideo(Video, Sana):
    """SANA-Video 2B of 480p. As SANA, it is used without its "complex human instruction"; a motion
    score is a part of the prompt, which its examples add (" motion score: 30.")."""

    adapter = "sana-video"
    pipeline = "SanaVideoPipeline"
    network_class = "SanaVideoTransformer3DModel"
    expected = dict(
        scheduler=dict(FLOW_SCHEDULER, use_dynamic_shifting=[False]),
        network=dict(
            guidance_embeds=[False],
            sample_size=[30],  # 22 is that of 720p, on the latents of LTX-2's autoencoder
        ),
    )
    since = (0, 36)
    call_defaults = (480, 832, 81)
    frames_argument = "frames"
