"""Which token belongs to which sample of a packed batch, and sums over samples."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """The samples of a batch, none of which is split."""

    owners: Tensor  # [num_tokens] int64, the sample of each token
    num_samples: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` [num_tokens] over each sample, at each of its tokens: [num_tokens]."""
        totals = values.new_zeros(self.num_samples).index_add(0, self.owners, values)
        return totals[self.owners]

    def mean(self, values: Tensor) -> Tensor:
        """As `sum`, divided by the sample's tokens."""
        return self.sum(values) / self.sum(values.new_ones(len(self.owners)))
