"Images and captions: scenes, photographs, COCO, splits, download, pixels, tokens and caches."
