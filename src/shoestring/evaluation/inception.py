"""The Inception network of FID: the TensorFlow graph of 2015.

It differs from torchvision's Inception v3 in its poolings (averages leave the padding out, one of the last
block's takes the maximum) and has 1,008 classes. The weights are the public conversion of the graph,
``pt_inception-2015-12-05-6726825d.pth``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.tensors import Float

CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
"""Values of the spatial features of a picture."""
"""Of 192, at 17 x 17 places: so many that spatial features are about as many as pooled ones."""

Size = int | tuple[int, int]


class Convolution(nn.Module):
    """Convolution, normalisation, rectification; padded so that odd kernels keep the size."""

    def __init__(self, wide_in: int, wide_out: int, kernel: Size, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else 0
        self.conv = nn.Conv2d(wide_in, wide_out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(wide_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three."""
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """Mean over 3 x 3, the padding left out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """Maximum over 3 x 3."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halved(x: Tensor) -> Tensor:
    """Maximum over 3 x 3 at every second place."""
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """35 x 35: 1 x 1, 5 x 5, twice 3 x 3, pooled."""

    def __init__(self, wide_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(wide_in, 64, 1)
        self.branch5x5_1 = Convolution(wide_in, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(wide_in, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(wide_in, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """All branches, side by side."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, wide_in: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(wide_in, 384, 3, 2, pad=False)
        self.branch3x3dbl_1 = Convolution(wide_in, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """All branches, side by side."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halved(x)], 1)


class BlockC(nn.Module):
    """17 x 17: 1 x 1, 7 x 7 in rows and columns, twice so, pooled."""

    def __init__(self, wide_in: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(wide_in, 192, 1)
        self.branch7x7_1 = Convolution(wide_in, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(wide_in, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))
        self.branch_pool = Convolution(wide_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """All branches, side by side."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, wide_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(wide_in, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1 = Convolution(wide_in, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """All branches, side by side."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), halved(x)], 1)


class BlockE(nn.Module):
    """8 x 8: 1 x 1, 3 x 3 as a row beside a column, twice 3 x 3 so, pooled."""

    def __init__(self, wide_in: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(wide_in, 320, 1)
        self.branch3x3_1 = Convolution(wide_in, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(wide_in, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(wide_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """All branches, side by side."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            1,
        )


@dataclass(frozen=True)
class InceptionOutput:
    """What the metrics read."""

    pooled_BF: Float[Tensor, "B 2048"]
    """Of the last block: FID, KID, precision and recall."""
    spatial_BS: Float[Tensor, "B 2023"]
    """17 x 17 places of 7 channels in the middle of the network, row by row, channels last: sFID."""
    logits_BC: Float[Tensor, "B 1008"]
    """Without the bias of the classifier, as in the ADM suite: Inception score."""


class Inception(nn.Module):
    """The network. Its parameters have the names of the public conversion, which are torchvision's.

    Source: Szegedy et al., arXiv 1512.00567; the poolings are those of the TensorFlow graph of 2015-12-05.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average)
        self.Mixed_7c = BlockE(2048, maximum)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Float[Tensor, "B 3 299 299"]) -> InceptionOutput:
        """Run the network.

        Args:
            x: pictures, (value - 128) / 128.

        Returns:
            All that the metrics read.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halved(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = halved(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial_B7hw = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled_BF = x.mean(dim=(2, 3))
        return InceptionOutput(
            pooled_BF, spatial_B7hw.permute(0, 2, 3, 1).flatten(1), F.linear(pooled_BF, self.fc.weight)
        )
