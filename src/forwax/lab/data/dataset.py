"""The two values that loading gives: a data set, or an error of one sentence."""

from dataclasses import dataclass

import numpy as np


class DataError(Exception):
    """A data set that cannot be loaded: what was expected, what came, and what to do, in one sentence.

    Example:
        >>> raise DataError("Expected a folder of data sets at x, but there is none; create it.")
        Traceback (most recent call last):
        ...
        forwax.lab.data.dataset.DataError: Expected a folder of data sets at x, but there is none;
        create it.
    """


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled images, split into training and test.

    Pixels are kept as they were stored; divide by ``scale`` for values in [0, 1].

    Attributes:
        name: the name that ``load`` knows it by.
        train_images: uint8 [N, height, width, channels].
        train_labels: int32 [N], from 0 to ``num_classes - 1``.
        test_images: uint8 [M, height, width, channels].
        test_labels: int32 [M].
        num_classes: the number of classes.
        class_names: one name for each label.
        scale: the largest value that a pixel can have, 16 or 255.

    Example:
        >>> import numpy as np
        >>> image, label = np.full((1, 2, 2, 1), 255, np.uint8), np.zeros(1, np.int32)
        >>> data = DataSet("white", image, label, image, label, num_classes=1, class_names=("white",), scale=255)
        >>> data.train_images.max() / data.scale
        np.float64(1.0)
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    scale: int
