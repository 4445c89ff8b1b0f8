"""scikit-learn's handwritten digits: 1,797 images of 8 by 8, in the package itself, so they need no file."""

import numpy as np

from forwax.lab.data.dataset import DataSet

TEST_SIZE = 360
SPLIT_SEED = 0


def load_digits() -> DataSet:
    """The digits in a fixed stratified split of 1,437 and 360.

    Example:
        >>> data = load_digits()
        >>> data.train_images.shape, data.test_images.shape, data.scale
        ((1437, 8, 8, 1), (360, 8, 8, 1), 16)
    """
    # Imported here, since scikit-learn takes over a second to import and only this set needs it.
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.asarray(images).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(labels).astype(np.int32)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)),
        test_size=TEST_SIZE,
        random_state=SPLIT_SEED,
        stratify=labels,
    )
    return DataSet(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        class_names=tuple("0123456789"),
        scale=16,
    )
