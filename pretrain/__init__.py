"""Pretraining from shards to checkpoint: model, loss, sample order, loading, training loop.

Letters in shape comments, for all packages of the project:

    B  pairs on this rank      N  pairs in the global batch   D  joint embedding width
    W  tower width             L  text tokens                 P  image patches
    F  mel bins                S  audio frames                C, H, Wd  channels, height, width
    Q  media items in a set    M  captions in a set           K  classes
"""
