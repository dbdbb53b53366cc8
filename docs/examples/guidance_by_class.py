"""A BATO with another guidance: the best query of every class guides before the second best of any.

By default the queries with the highest class score guide, so that a frequent class can take all places. Where stuff and
things share the queries, as in panoptic segmentation, each class that the model sees gets a say.
"""

from torch import Tensor

from dimaskdino.modeling.bato import BalanceAwareTokensOptimization
from dimaskdino.modeling.registry import BATO_REGISTRY


@BATO_REGISTRY.register()
class GuidanceByClass(BalanceAwareTokensOptimization):
    """BATO guided by queries of as many classes as there are."""

    def choose_guides(self, class_scores: Tensor) -> Tensor:
        """Order queries by their rank within their best class, then by score; (B, G) indices of (B, Q, K) scores."""
        scores, classes = class_scores.max(-1)
        same_class = classes[:, :, None] == classes[:, None, :]
        rank = (same_class & (scores[:, None, :] > scores[:, :, None])).sum(-1)
        # A sigmoid keeps the order of scores and lies between two ranks.
        order = scores.double().sigmoid() - rank
        return order.topk(min(self.num_guiding_tokens, order.shape[1]), dim=1).indices
