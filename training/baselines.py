"""What a reward model must beat: bags of words, with and without length, by logistic regression.

The features are TF-IDF weights of words and word pairs of the completion alone; the model is fitted to the
differences of better and worse completions, which makes it the same Bradley-Terry model with another input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feedback.rankings import ComparisonGroup
from training.evaluation import completion_text, length_rewards


class WordsBaseline:
    """TF-IDF words and word pairs, optionally with log length. Fitted once, then scores any completions."""

    def __init__(self, *, with_length: bool) -> None:
        self._with_length = with_length
        self._vectorizer: Any = None
        self._weights: Any = None

    def fit(self, groups: Sequence[ComparisonGroup]) -> WordsBaseline:
        """On all comparisons of `groups`, each pair once."""
        import numpy as np
        from scipy import sparse
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        self._vectorizer.fit([completion_text(c) for group in groups for c in group.completions])
        features = self._features(groups)
        better, worse, offset = [], [], 0
        for group in groups:
            better += [offset + pair.better for pair in group.pairs]
            worse += [offset + pair.worse for pair in group.pairs]
            offset += len(group.completions)
        gaps = features[better] - features[worse]
        # Each pair in both orders: the regression has no offset and needs two classes.
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        model.fit(sparse.vstack([gaps, -gaps]), np.repeat([1, 0], gaps.shape[0]))
        self._weights = model.coef_[0]
        return self

    def rewards(self, groups: Sequence[ComparisonGroup]) -> list[float]:
        """Of all completions, group after group."""
        return [float(reward) for reward in self._features(groups) @ self._weights]

    def _features(self, groups: Sequence[ComparisonGroup]) -> Any:
        from scipy import sparse

        words = self._vectorizer.transform([completion_text(c) for group in groups for c in group.completions])
        if not self._with_length:
            return words.tocsr()
        lengths = sparse.csr_matrix([[length] for length in length_rewards(groups)])
        return sparse.hstack([words, lengths]).tocsr()


def own_words_rewards(
    train: Sequence[ComparisonGroup], groups: Sequence[ComparisonGroup], *, with_length: bool
) -> list[float]:
    """Rewards by a baseline a source, fitted on that source's own training comparisons.

    The strongest simple baseline where sources disagree. Sources without training data get one fitted on all.
    """
    by_source: dict[str, list[ComparisonGroup]] = {}
    for group in train:
        by_source.setdefault(group.source, []).append(group)
    fitted = {source: WordsBaseline(with_length=with_length).fit(own) for source, own in by_source.items()}
    on_all = WordsBaseline(with_length=with_length).fit(train)
    rewards: list[float] = []
    for group in groups:
        rewards += fitted.get(group.source, on_all).rewards([group])
    return rewards
