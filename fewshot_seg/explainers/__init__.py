"""What made a query alike to its supports: our gradient attention and its rivals behind one interface.

An explainer is a function of a `Comparison` (model, supports with masks, query) and of the number of a photo; it
answers a map of that photo. `run_explainer` runs it on all photos and counts its passes through the network. See
docs/explain.md.
"""

from collections.abc import Mapping

from fewshot_seg.explainers.attention import background_evidence, gradient_attention, prior, soft_attention
from fewshot_seg.explainers.comparison import Comparison, Explainer, Explanation, Passes, run_explainer
from fewshot_seg.explainers.gradients import grad_cam, integrated_gradients, integrated_jacobians
from fewshot_seg.explainers.matching import pairwise_decomposition, support_affinity
from fewshot_seg.explainers.perturbation import chance, occlusion, shapley_sampling

EXPLAINERS: Mapping[str, Explainer] = {
    "attention": gradient_attention,
    "soft-attention": soft_attention,
    "prior": prior,
    "grad-cam": grad_cam,
    "integrated-gradients": integrated_gradients,
    "integrated-jacobians": integrated_jacobians,
    "pairwise": pairwise_decomposition,
    "affinity": support_affinity,
    "occlusion": occlusion,
    "shapley": shapley_sampling,
    "chance": chance,
}
"""By the names that ``fewshot-seg explain --explainers`` takes; the first two are ours."""

__all__ = [
    "EXPLAINERS",
    "Comparison",
    "Explainer",
    "Explanation",
    "Passes",
    "background_evidence",
    "chance",
    "grad_cam",
    "gradient_attention",
    "integrated_gradients",
    "integrated_jacobians",
    "occlusion",
    "pairwise_decomposition",
    "prior",
    "run_explainer",
    "shapley_sampling",
    "soft_attention",
    "support_affinity",
]
