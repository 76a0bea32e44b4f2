"""Maps the tokens of a packed batch to their samples, and sums over samples."""

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

    def mean(self, values: Tensor, counted: Tensor) -> Tensor:
        """The mean over those tokens of each sample that count ([num_tokens] bool); 0 if it has none."""
        counts = self.sum(counted.to(values.dtype))
        return self.sum(values.where(counted, 0.0)) / counts.clamp(min=1)
