"""Sections of the training config, which `pretrain.config` joins."""
