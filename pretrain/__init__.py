"""Shards to checkpoint: model, loss, sample order, loading and the training loop.

The letters of every shape comment in the project:

    B  pairs on this rank      N  pairs in the global batch   D  joint embedding width
    W  tower width             L  text tokens                 P  image patches
    F  mel bins                S  audio frames                C, H, Wd  channels, height, width
    Q  media items in a set    M  captions in a set           K  classes
"""
