"""The task on pictures: files of image data sets, views, recipes (docs/vision.md)."""
