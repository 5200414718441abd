"""The correction that a network has when it teaches the next step: Weight Aligning and BiC feed theirs back."""

import numpy as np

from longtail.posthoc.growing import aligning_factor, bias_layer

RAW, BIAS_LAYER = "raw", "bias_layer"
L2 = 0.1  # of BiC's release
WEIGHTS = {  # name: norm of a class's weights, whether the factor is clamped to at most 1
    "weight_aligning": (2, False),
    "weight_aligning_l1": (1, False),
    "weight_aligning_released": (1, True),
}


def correction(
    way: str, old: int, *, weight_ECD: np.ndarray, bias_EC: np.ndarray, logits_NC: np.ndarray, labels_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (C,) of the teacher's logits, float64.

    Args:
        way: raw, bias_layer or a name of WEIGHTS.
        old: number of old classes; 0 in the first step, whose logits need nothing.
        weight_ECD, bias_EC: of the head.
        logits_NC, labels_N: of the held-out images, for the bias layer.

    Raises ValueError where the correction needs held-out images and there are none.
    """
    classes = weight_ECD.shape[1]
    new_C = np.arange(classes) >= old
    scale_C, shift_C = np.ones(classes), np.zeros(classes)
    if way == RAW or not old:
        return scale_C, shift_C
    if way in WEIGHTS:
        norm, clamp = WEIGHTS[way]
        scale_C[old:] = aligning_factor(weight_ECD, new_C, norm=norm, clamp=clamp)
        shift_C[old:] = (1 - scale_C[old:]) * bias_EC.mean(0)[old:]
    elif not len(labels_N):
        raise ValueError(f"teacher: {way} is fitted on held-out memory; the protocol's held_out is 0")
    else:
        scale_C[old:], shift_C[old:] = bias_layer(logits_NC, labels_N, new_C, l2=L2)
    return scale_C, shift_C
