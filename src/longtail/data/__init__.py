"""From a source of images to batches: readers, the long tail and its cut, random draws, batches on the device."""
