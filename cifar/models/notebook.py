"""The deep Keras-style network of the notebooks: conv-conv-pool-dropout blocks and a dense head."""

from torch import Tensor, nn

DENSE = 128


class NotebookCnn(nn.Module):
    """Normalised float images (B, 3, S, S) -> logits (B, C). Dropout rises by 0.1 a block, as the notebooks have it."""

    def __init__(self, num_classes: int, widths: tuple[int, ...], dropout: float, image_size: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for block, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            for channels in (before, after):
                blocks += [nn.Conv2d(channels, after, 3, padding="same"), nn.ReLU(), nn.BatchNorm2d(after)]
            blocks += [nn.MaxPool2d(2), nn.Dropout(min(dropout + 0.1 * block, 0.9) if dropout else 0.0)]
        self.blocks = nn.Sequential(*blocks)
        side = image_size >> len(widths)
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[-1] * side**2, DENSE),
            nn.ReLU(),
            nn.BatchNorm1d(DENSE),
            nn.Dropout(min(dropout + 0.1 * len(widths), 0.9) if dropout else 0.0),
        )
        self.head = nn.Linear(DENSE, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dense(self.blocks(images)))
