"""Fine-tune the embedded model with a reward of your own: ``python examples/own_reward.py [OUTPUT_DIR]``."""

import sys

from crd import CRDConfig, CRDTrainer


def greenness(images, prompts, **metadata):
    """Any callable that gives one number (or None) per picture is a reward."""
    means = [image.convert("RGB").resize((1, 1)).getpixel((0, 0)) for image in images]
    return [(green - (red + blue) / 2) / 255 for red, green, blue in means]


trainer = CRDTrainer(
    model="nano",
    reward_funcs=[greenness],
    train_prompts=["a photo of a circle", "a photo of two squares", "a photo of a ring and a triangle"],
    eval_prompts=["a photo of three crosses", "a photo of a triangle"],
    config=CRDConfig(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/own-reward",
        rollout={"prompts_per_epoch": 2, "group_size": 6, "steps": 6},
        train={"epochs": 2, "learning_rate": 1e-3, "micro_batch": 64},
        evaluation={"steps": 8},
    ),
)
print("the LoRA file, the figures and the summary are in", trainer.train())
