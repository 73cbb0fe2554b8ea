"""Training data of another class, which takes no text."""

from relay_diffusion.data import ImageDataModule


class Data(ImageDataModule):
    """Accepts fewer options."""

    def __init__(self, dataset, batch_size, num_workers=0, seed=0, text_cache=""):  # noqa: ARG002
        super().__init__(dataset, batch_size, num_workers, seed)
