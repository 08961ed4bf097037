"""Captions that models write: decoders, greedy and beam search, CIDEr-D."""
